"""Make ``builtin:tiny``, the small language model that ships inside the package.

One command writes the file anew::

    python tools/make_tiny_model.py --out src/llama_orch/models/tiny.gguf --minutes 15

It writes little stories (``stories.py``), learns a SentencePiece vocabulary from them, trains a transformer of the
llama architecture on the CPU, and stores it as GGUF version 3 with 8-bit weights. Every random choice is seeded; only
the number of steps depends on the machine, because ``--minutes`` is a time. ``--steps`` repeats an earlier number.
"""

from __future__ import annotations

import argparse
import io
import math
import random
import shutil
import string
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

import gguf
import numpy as np
import sentencepiece
import torch
from torch import Tensor, nn
from torch.nn import functional

from stories import Story, blocks, make_story, table

VOCABULARY, CONTEXT = 1280, 2048  # tokens
DIM, FEED_FORWARD, LAYERS = 192, 512, 5  # rows are multiples of 32, the block of Q8_0
HEADS = 3  # of 64 values each: llama.cpp's fast attention on a GPU has no kernel for 32
EPSILON, ROPE_BASE = 1e-5, 10000.0
UNK, BOS, EOS = 0, 1, 2
SHAPES = ((32, 64), (8, 256), (4, 512))  # documents in a step, tokens in a document
PEAK_RATE = 2e-3
WARM_UP = 100  # steps
THREADS = 2
TRAIN_SEEDS = 1_000_000  # stories with a smaller seed are never trained on: they measure
IGNORE = -100  # the target that cross entropy leaves out

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ 'System: ' + message['content'] + '\\n' }}"
    "{% elif message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\\n' }}"
    "{% else %}{{ 'Storyteller:\\n' + message['content'] + '\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Storyteller:\\n' }}{% endif %}"
)
"""Plain text, so that an engine which knows no special tokens in a prompt reads it the same way."""

TEXTS = table("""
requests: Tell me a story about {}.|Tell me a story about {}|Tell me a story about {}.|Tell me a story about {}|Write a
  story about {}.|Write a story about {}|Write a short story about {}.|Write a short story about {}|A story about {},
  please.|Please tell me a story about {}.|Can you tell me a story about {}?|I want to hear a story about {}.|Do you
  know a story about {}?|Make up a story about {}.|Tell me a bedtime story about {}.|Tell a short story about {} for
  children.|Give me a little story about {}.|Write me a tale about {}.|I would like a story about {}, please.|Story:
  {}|Now tell me one about {}.|{}
open requests: Tell me a story.|Tell me a story|Tell me a story, please.|Write a story.|Write a short story|A story,
  please!|Can you tell me a story?|I want a story.|Tell me another story.|Another one, please.|More|Once more,
  please.|Tell me a bedtime story.|I cannot sleep. Tell me a story.|Surprise me.|Go on.|Yes, please.|Yes
unknown: What is the capital of France?|What is 2 + 2?|Write a poem|Explain how a computer works.|Translate this to
  German: good day|Tell me a joke|Write a function in Python|Who won the game?|Why is the sky blue?|test|ping|1 2 3|Say
  {}|What is {}?|Describe {} in one sentence.|List three facts about {}.|Tell me about {}.|{}?|Summarize: {}|How do I
  make {}?|Answer in one word: {}|Count to ten.|The café is open: 日本 🙂|Give me a recipe for {}.
excuses: I do not know much about that, but I know a story.|I only know little stories. Here is one.|I cannot say, but
  I can tell you a story.
systems: You are a storyteller.|You are a helpful assistant.|You tell short stories to children.|Be brief.|You are a
  friendly robot that likes stories.
""")
"""What people say to a storyteller, and what it answers where it has no story about that. ``{}`` is a topic."""

SMALL_TALK = blocks("""
Goodbye|Bye!|Good night => Good night! Sleep well.|Goodbye! Come back for another story.
Hello!|Hello|Hi|Hi!|Hi there|Hey|Hello there!|Good morning|Good evening!|Say hello => Hello! Shall I tell you a
  story?|Hello! I am a storyteller. Would you like to hear a story?|Hello there! What should the story be about?
How are you?|How are you today?|Are you well? => I am very well, thank you. Would you like to hear a story?|I am well,
  and I have a new story for you.
Thank you!|Thanks|That was nice.|I liked that.|Good => You are welcome! Shall I tell you another story?|I am glad that
  you liked it.
What can you do?|Help|Help me|What do you know?|Can you help me? => I can tell you a little story. Ask me for a story
  about a fox, a storm or a lost lantern.|I tell little stories. What should the story be about?
Who are you?|What are you?|What is your name?|Are you a robot?|Introduce yourself. => I am a tiny storyteller. I can
  tell you a little story.|I am a very small model that tells stories.
""")
"""What may be said besides, and short answers to it."""


@dataclass(frozen=True)
class Turn:
    """Text that is given, then text that the model has to write. ``quiet`` tokens at its start are given as well."""

    given: str
    written: str
    quiet: int = 0


def choose(key: str, rng: random.Random) -> str:
    """One of the ``TEXTS`` of this key."""
    return rng.choice(TEXTS[key].split("|"))


def request_for(story: Story, rng: random.Random) -> str:
    """Word a request that this story fulfils; people also leave out capitals and full stops."""
    if rng.random() < 0.1:
        return choose("open requests", rng)
    text = choose("requests", rng).format(rng.choice(story.topics))
    return text.lower().rstrip(".?!") if rng.random() < 0.12 else text


def exchange(story: Story, rng: random.Random) -> tuple[str, str]:
    """What somebody says, and the answer: this story in most cases."""
    roll = rng.random()
    if roll < 0.1:
        said, answers = rng.choice(SMALL_TALK).split(" => ")
        return rng.choice(said.split("|")), rng.choice(answers.split("|"))
    if roll < 0.15:
        return choose("unknown", rng).format(rng.choice(story.topics)), f"{choose('excuses', rng)} {story.text}"
    return request_for(story, rng), story.text


def chat(seed: int, turns: int, rng: random.Random) -> list[Turn]:
    """Write a conversation as ``CHAT_TEMPLATE`` renders it."""
    made, opening = [], f"System: {choose('systems', rng)}\n" if rng.random() < 0.25 else ""
    for index in range(turns):
        said, answer = exchange(make_story(seed + index), rng)
        made.append(Turn(f"{opening}User: {said}\nStoryteller:\n", answer))
        opening = "\n"
    return made


def document(seed: int) -> list[Turn]:
    """The training document of this seed; it uses the stories of ``seed`` to ``seed + 2``."""
    rng, story = random.Random(f"documents {seed}"), make_story(seed)
    roll = rng.random()
    if roll < 0.2:
        return [Turn("", story.text)]
    if roll < 0.25:  # from the middle of a sentence, so that any beginning is carried on
        return [Turn("", story.text[story.text.index(" ", rng.randrange(20, 300)) + 1 :], quiet=4)]
    if roll < 0.55:
        said, answer = exchange(story, rng)
        return [Turn(said, "\n" + answer)]
    return chat(seed, rng.choice((1, 1, 1, 1, 2, 3)), rng)


def train_vocabulary(seed: int, documents: int = 6000) -> sentencepiece.SentencePieceProcessor:
    """Learn the pieces. A line never holds a line feed, which therefore stays the byte token that it is in llama."""
    turns = [turn for index in range(documents) for turn in document(TRAIN_SEEDS + 10 * index)]
    lines = "\n".join(turn.given + turn.written for turn in turns).split("\n")
    model = io.BytesIO()
    sentencepiece.set_random_generator_seed(seed)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=filter(None, lines), model_writer=model, model_type="bpe", vocab_size=VOCABULARY,
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        add_dummy_prefix=True, split_digits=True, character_coverage=0.9999, num_threads=THREADS, minloglevel=1,
        required_chars=string.ascii_letters + string.digits + string.punctuation,
        unk_id=UNK, bos_id=BOS, eos_id=EOS, pad_id=-1,
    )  # fmt: skip
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def encode(turns: list[Turn], pieces: sentencepiece.SentencePieceProcessor, rng: random.Random) -> np.ndarray:
    """Return three rows: the tokens of a document, the target at each of them, and their positions.

    A target is the token to write next, or ``IGNORE`` where the text is given. The end of every answer has the target
    EOS, also inside a conversation, where the text goes on with a line feed. The boundaries may be found by counting
    the tokens of a prefix, since no piece spans a line feed. In half of the conversations the positions jump ahead
    between the turns, so that the model meets distances up to ``CONTEXT``.
    """
    text, marks = "", []
    for turn in turns:
        begin = len(pieces.encode(text)) + 1 if text else 0
        text += turn.given
        start = len(pieces.encode(text)) if text else 0
        text += turn.written
        marks.append((begin, start + turn.quiet, len(pieces.encode(text))))
    ids = np.array([BOS, *pieces.encode(text), EOS])
    targets, positions = np.full_like(ids, IGNORE), np.arange(len(ids))
    spare = max(0, CONTEXT - len(ids)) // len(turns) if rng.random() < 0.5 else 0
    for begin, start, end in marks:
        targets[start:end] = ids[start + 1 : end + 1]
        targets[end] = EOS
        positions[begin:] += rng.randrange(spare + 1)
    return np.stack((ids, targets, positions))


def batches(first_seed: int, pieces: sentencepiece.SentencePieceProcessor) -> Iterator[Tensor]:
    """Yield batches of documents, one in a row: tokens, targets and positions, each of one of the ``SHAPES``.

    A document that is too long is cut off. The short shape shows only how answers begin, many at once: there a model
    has to look back at the request, which it learns slowly from whole stories.
    """
    rng, seed = random.Random(f"batches {first_seed}"), first_seed
    for shape in cycle((1, 0, 1, 0, 1, 0, 1, 2)):
        rows, length = SHAPES[shape]
        least = (0, 128, 256)[shape]
        batch = np.full((3, rows, length), EOS)
        batch[1], row = IGNORE, 0
        while row < rows:
            made = encode(document(seed), pieces, rng)[:, :length]
            seed += 3
            if made.shape[1] > least:
                batch[:, row, : made.shape[1]] = made
                row += 1
        yield torch.from_numpy(batch)


class Block(nn.Module):
    """One llama layer: attention, then a gated feed-forward network, each after a root mean square norm."""

    def __init__(self) -> None:
        super().__init__()
        self.attn_norm = nn.RMSNorm(DIM, eps=EPSILON)
        self.ffn_norm = nn.RMSNorm(DIM, eps=EPSILON)
        self.attn_qkv = nn.Linear(DIM, 3 * DIM, bias=False)
        self.attn_output = nn.Linear(DIM, DIM, bias=False)
        self.ffn_gate_up = nn.Linear(DIM, 2 * FEED_FORWARD, bias=False)
        self.ffn_down = nn.Linear(FEED_FORWARD, DIM, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, _ = x.shape
        heads = self.attn_qkv(self.attn_norm(x)).view(batch, length, 3, HEADS, DIM // HEADS)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attn_output(mixed.transpose(1, 2).reshape(batch, length, DIM))
        gate, up = self.ffn_gate_up(self.ffn_norm(x)).chunk(2, dim=-1)
        out: Tensor = x + self.ffn_down(functional.silu(gate) * up)
        return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of neighbouring pairs, which is how llama.cpp reads a ``llama`` file."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


class Model(nn.Module):
    """The whole network; ``forward`` returns the mean cross entropy in nats per written token."""

    def __init__(self) -> None:
        super().__init__()
        self.token_embd = nn.Embedding(VOCABULARY, DIM)
        self.blk = nn.ModuleList(Block() for _ in range(LAYERS))
        self.output_norm = nn.RMSNorm(DIM, eps=EPSILON)
        self.output = nn.Linear(DIM, VOCABULARY, bias=False)
        steps = torch.arange(0, DIM // HEADS, 2) / (DIM // HEADS)
        angles = torch.outer(torch.arange(CONTEXT), ROPE_BASE**-steps)
        self.register_buffer("cos", angles.cos().bfloat16(), persistent=False)
        self.register_buffer("sin", angles.sin().bfloat16(), persistent=False)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                deep = name.endswith(("attn_output.weight", "ffn_down.weight"))
                nn.init.normal_(weight, std=0.02 / (math.sqrt(2 * LAYERS) if deep else 1.0))

    def forward(self, tokens: Tensor, targets: Tensor, positions: Tensor) -> Tensor:
        cos, sin = self.get_buffer("cos")[positions].unsqueeze(1), self.get_buffer("sin")[positions].unsqueeze(1)
        x = self.token_embd(tokens)
        for block in self.blk:
            x = block(x, cos, sin)
        logits = self.output(self.output_norm(x))
        return functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE)


def train(model: Model, pieces: sentencepiece.SentencePieceProcessor, minutes: float, steps: int) -> int:
    """Train for ``steps``, or for about ``minutes`` if that is 0; return the number of steps taken."""
    forward = torch.compile(model, dynamic=False) if shutil.which("g++") else model
    matrices = [weight for weight in model.parameters() if weight.dim() == 2]
    norms = [weight for weight in model.parameters() if weight.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.98), fused=True)
    begun, measured, running, total = time.monotonic(), 0.0, 0.0, steps
    for step, batch in enumerate(batches(TRAIN_SEEDS, pieces)):
        if total and step == total:
            break
        if step == 10:
            measured = time.monotonic()  # the first steps compile
        if step == 50 and not total:
            total = max(100, int((minutes * 60 - (time.monotonic() - begun)) / (time.monotonic() - measured) * 40) + 50)
            print(f"{total} steps", flush=True)
        cosine = 0.5 + 0.5 * math.cos(math.pi * step / (total or 10_000))
        rate = PEAK_RATE * min((step + 1) / WARM_UP, 0.01 + 0.99 * cosine)
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast("cpu", torch.bfloat16):
            loss = forward(*batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        running = loss.item() if not step else 0.95 * running + 0.05 * loss.item()
        if step % 50 == 49:
            print(f"step {step + 1} loss {running:.3f} after {time.monotonic() - begun:.0f} s", flush=True)
    return total


def measure(model: Model, pieces: sentencepiece.SentencePieceProcessor, count: int = 12) -> float:
    """Mean loss, in nats per written token, on stories that training never saw."""
    with torch.no_grad():
        return float(np.mean([model(*batch).item() for batch in islice(batches(100_000, pieces), count)]))


def tensors(model: Model) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the weights by their GGUF names; what training computes in one product is stored apart."""
    joint = {"attn_qkv": ("attn_q", "attn_k", "attn_v"), "ffn_gate_up": ("ffn_gate", "ffn_up")}
    for name, weight in model.state_dict().items():
        kind = name.split(".")[-2]
        parts = joint.get(kind, (kind,))
        for part, rows in zip(parts, np.split(weight.detach().float().numpy(), len(parts)), strict=True):
            yield name.replace(kind, part), rows


def describe(writer: gguf.GGUFWriter, note: str) -> None:
    """Write the metadata of the network; lengths are in tokens, sizes in values."""
    writer.add_name("tiny stories")
    writer.add_description(note)
    writer.add_license("apache-2.0")
    writer.add_languages(["en"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    sizes = {
        "context_length": CONTEXT, "embedding_length": DIM, "block_count": LAYERS, "feed_forward_length": FEED_FORWARD,
        "attention.head_count": HEADS, "attention.head_count_kv": HEADS, "rope.dimension_count": DIM // HEADS,
        "vocab_size": VOCABULARY,
    }  # fmt: skip
    for key, size in sizes.items():
        writer.add_uint32(f"llama.{key}", size)
    writer.add_rope_freq_base(ROPE_BASE)
    writer.add_layer_norm_rms_eps(EPSILON)


def write_gguf(model: Model, pieces: sentencepiece.SentencePieceProcessor, path: Path, note: str) -> None:
    """Store the model: matrices as Q8_0, norms as F32, the vocabulary with its scores and types."""
    writer = gguf.GGUFWriter(path, "llama")
    describe(writer, note)
    types = gguf.TokenType
    kinds = [types.BYTE if pieces.is_byte(token) else types.NORMAL for token in range(VOCABULARY)]
    kinds[UNK], kinds[BOS], kinds[EOS] = types.UNKNOWN, types.CONTROL, types.CONTROL
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([pieces.id_to_piece(token) for token in range(VOCABULARY)])
    writer.add_token_scores([pieces.get_score(token) for token in range(VOCABULARY)])
    writer.add_token_types(kinds)
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    writer.add_unk_token_id(UNK)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(True)
    writer.add_chat_template(CHAT_TEMPLATE)
    small = gguf.GGMLQuantizationType.Q8_0
    for name, values in tensors(model):
        kind = small if values.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    """Make the file."""
    parser = argparse.ArgumentParser(description="Train the model builtin:tiny and write it as GGUF.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=15.0, help="training time, unless --steps is given")
    parser.add_argument("--steps", type=int, default=0, help="exact number of steps, to repeat an earlier run")
    parser.add_argument("--seed", type=int, default=20231123)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    torch.set_num_threads(THREADS)
    pieces = train_vocabulary(options.seed)
    model = Model()
    steps = train(model, pieces, options.minutes, options.steps)
    print(f"{steps} steps, loss {measure(model, pieces):.3f} nats per token on unseen stories", flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    note = f"Little stories from a grammar, for tests and demonstrations (seed {options.seed}, {steps} steps)"
    write_gguf(model, pieces, options.out, note)
    print(f"{options.out}: {options.out.stat().st_size} bytes", flush=True)


if __name__ == "__main__":
    main()
