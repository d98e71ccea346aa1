"""The configuration file, the home folder, the token and the bind rule."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest

from llama_orch import settings as module
from llama_orch.contract.config import Settings
from llama_orch.settings import (
    Home,
    SettingsError,
    api_token,
    check_bind,
    check_settings,
    load_settings,
    model_problem,
    parse_settings,
)


def _problems(text: str) -> list[str]:
    with pytest.raises(SettingsError) as refused:
        parse_settings(text, "c.yaml")
    return [problem.removeprefix("c.yaml").lstrip(":").strip() for problem in refused.value.problems]


# --- the file ---


@pytest.mark.spec("HP-ALN-3")
@pytest.mark.parametrize("text", ["", "# nothing\n", "{}", "\ufeff"])
def test_empty_file_is_the_defaults(text: str, tmp_path: Path) -> None:
    """Every key has a default: an empty file, with or without a byte order mark, is valid."""
    file = tmp_path / "c.yaml"
    file.write_text(text)
    assert load_settings(file, {}) == Settings()
    assert check_settings(Settings()) == []


def test_where_the_file_is_named(tmp_path: Path) -> None:
    """The argument wins over LLORCH_CONFIG; without either the defaults hold."""
    (tmp_path / "a.yaml").write_text("server: {port: 1}")
    (tmp_path / "b.yaml").write_text("server: {port: 2}")
    env = {"LLORCH_CONFIG": str(tmp_path / "b.yaml")}
    assert load_settings(tmp_path / "a.yaml", env).server.port == 1
    assert load_settings(None, env).server.port == 2
    assert load_settings(None, {"LLORCH_CONFIG": ""}) == Settings()


@pytest.mark.spec("HP-ALN-3")
@pytest.mark.parametrize(
    ("text", "path", "nearest"),
    [
        ("servr: {}", "servr", "server"),
        ("server: {prot: 1}", "server.prot", "port"),
        ("pools: [{}, {queue: {capacty: 1}}]", "pools[1].queue.capacty", "capacity"),
        ("devices: [{id: a, vram_byte: 1}]", "devices[0].vram_byte", "vram_bytes"),
        ("sampler_profiles: {v2: {temprature: 1}}", "sampler_profiles.v2.temprature", "temperature"),
    ],
)
def test_unknown_key(text: str, path: str, nearest: str) -> None:
    """An unknown key is refused with its dotted path and the nearest known one."""
    assert _problems(text) == [f"{path}: unknown key; did you mean {nearest!r}?"]


def test_unknown_key_like_no_other() -> None:
    """A key that is near to none is refused with the known ones."""
    assert _problems("logs: {zzz: 1}") == ["logs.zzz: unknown key; known here: level, format"]
    assert _problems("engines: {ctransformers: {a: 1}}") == [
        "engines.ctransformers.a: unknown key; this section has no keys"
    ]


@pytest.mark.spec("HP-ALN-3")
def test_all_problems_at_once() -> None:
    """A file is read once: unknown keys and wrong values of all sections are named together."""
    text = "server: {port: x, hots: h}\npools: [{ctx: 1, devices: 3, slots: true}]\nlogs: {level: loud}"
    assert [problem.partition(":")[0] for problem in _problems(text)] == [
        "server.port",
        "server.hots",
        "pools[0].ctx",
        "pools[0].devices",
        "pools[0].slots",
        "logs.level",
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("logs: {level: loud}", "logs.level: Invalid enum value 'loud'; one of: debug, info, warning, error"),
        ("devices: all", "devices: Invalid enum value 'all'; one of: auto, a list"),
        ("sampler_profiles: {v: {temperature: .nan}}", "sampler_profiles.v.temperature: is not a finite number"),
        ("sampler_profiles: {1: {}}", "sampler_profiles.1: keys are text; quote this one"),
        ("- a", "the file: Expected `object`, got `array`"),
        ("pools: []", "pools: Expected `array` of length >= 1"),
        ("devices: [{uuid: a}]", "devices[0]: Object missing required field `id`"),
        ("server: {allowed_hosts: [a, 1]}", "server.allowed_hosts[1]: Expected `str`, got `int`"),
    ],
)
def test_wrong_value(text: str, problem: str) -> None:
    """A wrong value is refused with its path and what it may be."""
    assert _problems(text) == [problem]


def test_yamls_truth_values_are_explained() -> None:
    """YAML takes a bare off for false; the message says to quote it."""
    assert "quote off" in _problems("sessions: {budgets: {mode: off}}")[0]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: &x 1", "1: anchors and aliases"),
        ("a: 1\nb: *x", "2: anchors and aliases"),
        ("logs: {level: info,\n  level: debug}", "2: the key 'level' repeats"),
        ("<<: {logs: {}}", "1: merge keys"),
        ("[" * 100, "1: the file is nested too deeply"),
        ("a: !!python/object/apply:os.getpid []", "1: could not determine a constructor"),
        ("a: [", "node content"),
        ("a: 1\n---\nb: 1", "but found another document"),
        ("? {a: 1}\n: 2", "unhashable key"),
        ("server: {port: " + "9" * 5000 + "}", "is not valid YAML"),
        ("a: 2026-99-99", "is not valid YAML"),
        ("a: \0", "is not valid YAML"),
    ],
)
def test_yaml_that_is_refused(text: str, problem: str) -> None:
    """What repeats, grows, nests without end or builds objects is refused with its line."""
    (found,) = _problems(text)
    assert problem in found


def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is absent, a folder, too large or no text is a problem with its name, not a crash."""
    monkeypatch.setattr(module, "FILE_BYTES_MAX", 10)
    (tmp_path / "large").write_text("#" * 11)
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for name in ("absent", ".", "large", "binary"):
        with pytest.raises(SettingsError) as refused:
            load_settings(tmp_path / name, {})
        assert str(tmp_path / name) in refused.value.problems[0]


@pytest.mark.spec("HP-ALN-3")
def test_defaults_agree_with_the_published_schema() -> None:
    """The schema that `config schema` prints allows no key that the program refuses, section by section."""
    schema = json.loads((files("llama_orch.contract") / "documents" / "config.schema.json").read_text())
    assert list(schema["properties"]) == list(Settings.__struct_fields__)


# --- contradictions ---


SIMULATED = "devices: [{id: a, backend: simulated, vram_bytes: 1000}, {id: b, backend: simulated, vram_bytes: 1000}]\n"
ONE_CARD = "devices: [{id: a, uuid: GPU-1, vram_bytes: 1000}, {id: b, uuid: GPU-1, vram_bytes: 500}]\n"


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("pools: [{}, {}]", "pools"),
        ("devices: [{id: a, backend: cpu}, {id: a, backend: cpu}]", "devices"),
        ("devices: [{id: a, uuid: GPU-1}, {id: b, uuid: GPU-1}]", "devices"),
        ("devices: [{id: a, uuid: GPU-1, vram_bytes: 1000}, {id: b, uuid: GPU-1}]", "devices"),
        ("devices: [{id: a}]", "devices[0].uuid"),
        ("devices: [{id: a, uuid: GPU-1, backend: cpu}]", "devices[0].uuid"),
        ("devices: [{id: a, backend: simulated}]", "devices[0].vram_bytes"),
        (SIMULATED + "pools: [{devices: [a, c]}]", "pools[0].devices"),
        (SIMULATED + "pools: [{devices: [a, a]}]", "pools[0].devices"),
        (SIMULATED + "pools: [{devices: [a], tensor_split: [1]}]", "pools[0].tensor_split"),
        (SIMULATED + "pools: [{tensor_split: [1, 1]}]", "pools[0].tensor_split"),
        (SIMULATED + "pools: [{devices: [a, b], tensor_split: [1]}]", "pools[0].tensor_split"),
        (SIMULATED + "pools: [{devices: [a, b], tensor_split: [0, 0]}]", "pools[0].tensor_split"),
        (SIMULATED + "pools: [{devices: [a, b], tensor_split: [1, 1], replicas: 2}]", "pools[0].replicas"),
        (ONE_CARD + "pools: [{devices: [a, b], tensor_split: [2, 1]}]", "pools[0].tensor_split"),
        ("pools: [{engine: vllm}]", "pools[0].engine"),
        ("pools: [{sampler_profile_version: v9}]", "pools[0].sampler_profile_version"),
        ("pools: [{ctx: 128, max_tokens: 129}]", "pools[0].max_tokens"),
        ("pools: [{ctx: 16777216, slots: 2}]", "pools[0]"),
        ("engines: {llamacpp: {launcher: binary}}", "engines.llamacpp.binary"),
        ("engines: {llamacpp: {binary: /x}}", "engines.llamacpp.binary"),
        ("engines: {llamacpp: {extra_args: [-x]}}", "engines.llamacpp.extra_args"),
    ],
)
def test_contradiction(text: str, path: str) -> None:
    """Values that contradict each other are refused with the path of the one to change."""
    (problem,) = _problems(text)
    assert problem.partition(": ")[0] == path


def test_a_card_that_is_named_twice() -> None:
    """The refusal says what makes one card several devices."""
    (problem,) = _problems("devices: [{id: a, uuid: GPU-1}, {id: b, uuid: GPU-1}, {id: c, uuid: GPU-2}]")
    assert problem == (
        "devices: the uuid 'GPU-1' is given more than once; "
        "give each device of this card its vram_bytes, or name the card once"
    )


@pytest.mark.parametrize(
    "text",
    [
        SIMULATED + "pools: [{devices: [a, b], tensor_split: [2, 1]}]",
        SIMULATED + "pools: [{id: x, devices: [a]}, {id: y, devices: [b], model: 'file:/m.gguf', engine: simulated}]",
        "pools: [{devices: [gpu0]}]",  # the driver's names are known later
        "engines: {llamacpp: {launcher: binary, binary: /usr/bin/llama-server, extra_args: [-x]}}",
        "devices: [{id: gpu0, uuid: GPU-1, name: RTX 3090, vram_bytes: 25769803776, backend: cuda}]",
        ONE_CARD + "pools: [{id: x}, {id: y, devices: [b, a]}]",
        "pools: [{sampler_profile_version: v2}]\nsampler_profiles: {v2: {}}",
        "on_demand: {enabled: false, slots: 1, keep_alive_ms: 0, min_residency_ms: 0}",
        "catalog: {file_roots: [/models, ~/models]}",
        "pools: [{keep_alive_ms: 0}]",
        "tasks: {keep_transcripts: true}",
        "policy: {outbound: {default: deny, allow: ['https://*.example.com:443', 10.0.0.0/8, '[fd00::/8]:80']}}",
    ],
)
def test_no_contradiction(text: str) -> None:
    """What belongs together is accepted."""
    assert isinstance(parse_settings(text, "c.yaml"), Settings)


@pytest.mark.spec("HP-ALN-3")
@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("catalog: {trust_policy: {mode: strict}}", "catalog.trust_policy.mode"),
    ],
)
def test_nothing_is_ignored_in_silence(text: str, path: str) -> None:
    """A setting of a part that is not built is refused, unless it is its default."""
    assert _problems(text) == [f"{path}: is not built in this version; leave it out"]


def test_defaults_of_what_is_not_built_may_be_written_out() -> None:
    """A file that spells the defaults out is valid."""
    text = (
        "on_demand: {enabled: true}\nsessions: {max_turns: 8, budgets: {mode: 'off'}}\npools: [{keep_alive_ms: null}]"
    )
    assert parse_settings(text, "c.yaml") == Settings()


@pytest.mark.parametrize("reference", ["builtin:tiny", "file:/m.gguf", "file:m.gguf"])
def test_model_references_that_are_served(reference: str) -> None:
    """Built-in models and files can be served."""
    assert model_problem(reference) is None


@pytest.mark.parametrize(
    "reference",
    [
        "hf:a/b/c.gguf",
        "https://x/y",
        "http://x",
        "sha256:ab",
        "my-model",
        "builtin:",
        "builtin:a/b",
        "file:",
        "file:a\0b",
    ],
)
def test_model_references_that_are_not(reference: str) -> None:
    """Other references are refused with the ones that are served."""
    assert "builtin:tiny" in str(model_problem(reference))


# --- home and token ---


def test_home_folder(tmp_path: Path) -> None:
    """LLORCH_HOME, else the XDG data folder, else ~/.local/share; a relative XDG folder does not count."""
    assert Home.of({"LLORCH_HOME": "/a"}).path == Path("/a")
    assert Home.of({"LLORCH_HOME": "a"}).path.is_absolute()
    assert Home.of({"XDG_DATA_HOME": "/x", "HOME": "/h"}).path == Path("/x/llama-orch")
    for env in ({"HOME": "/h"}, {"XDG_DATA_HOME": "relative", "HOME": "/h"}):
        assert Home.of(env).path == Path("/h/.local/share/llama-orch")


@pytest.mark.spec("HP-SEC-3")
def test_home_folder_is_private(tmp_path: Path) -> None:
    """A new home folder can be entered by its user only; one that cannot be made is a problem."""
    home = Home(tmp_path / "a" / "b").create().create()
    assert stat.S_IMODE(home.path.stat().st_mode) == 0o700
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match="LLORCH_HOME"):
        Home(tmp_path / "file").create()


@pytest.mark.spec("HP-SEC-3")
def test_token_is_generated_once(tmp_path: Path) -> None:
    """The first start makes a 0600 file; later ones read it; the environment wins over it."""
    home = Home(tmp_path / "home")
    with pytest.raises(SettingsError, match="LLORCH_API_TOKEN"):
        api_token(home, {}, create=False)
    token, source = api_token(home, {}, create=True)
    assert source == "generated"
    assert len(token) >= 43
    assert stat.S_IMODE(home.token_file.stat().st_mode) == 0o600
    assert api_token(home, {}, create=True) == api_token(home, {}, create=False) == (token, "file")
    assert api_token(home, {"LLORCH_API_TOKEN": "m" * 16}, create=False) == ("m" * 16, "environment")
    with pytest.raises(SettingsError, match="at least 16 characters"):
        api_token(home, {"LLORCH_API_TOKEN": "short"}, create=False)
    assert [path.name for path in home.path.iterdir()] == ["token"]


@pytest.mark.spec("HP-SEC-3")
def test_starts_at_once_agree_on_the_token(tmp_path: Path) -> None:
    """Of several processes that find no token, all end up with the same one."""
    script = (
        "import sys; from pathlib import Path; from llama_orch.settings import *; sys.stdin.read();"
        "print(api_token(Home(Path(sys.argv[1])), {}, True)[0])"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "home")]
    gate, hold = os.pipe()  # its end starts them all
    processes = [subprocess.Popen(command, stdin=gate, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    os.close(gate)
    os.close(hold)
    tokens = {process.communicate(timeout=60)[0] for process in processes}
    assert tokens == {(tmp_path / "home" / "token").read_text()}


@pytest.mark.spec("HP-SEC-3", "HP-SEC-7")
@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_token_that_others_can_read(tmp_path: Path, mode: int) -> None:
    """A token file with rights for others is refused with what to do."""
    home = Home(tmp_path)
    home.token_file.write_text("t" * 30)
    home.token_file.chmod(mode)
    with pytest.raises(SettingsError, match="chmod 600") as refused:
        api_token(home, {}, create=True)
    assert "ttt" not in str(refused.value)


def test_token_file_that_is_a_link(tmp_path: Path) -> None:
    """A link in the token's place is not followed."""
    (tmp_path / "elsewhere").write_text("t" * 30)
    (tmp_path / "token").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SettingsError):
        api_token(Home(tmp_path), {}, create=True)


@pytest.mark.spec("HP-SEC-7")
@pytest.mark.parametrize("token", ["a b", "a\n", "a\r\nX: y", "schlüssel", "\x7f", "a\tb"])
def test_token_that_no_header_can_carry(tmp_path: Path, token: str) -> None:
    """A token is visible ASCII, in the file and in the environment; the message does not repeat it."""
    home = Home(tmp_path)
    home.token_file.write_text(token + "\n")
    home.token_file.chmod(0o600)
    for env in ({"LLORCH_API_TOKEN": token}, {}):
        with pytest.raises(SettingsError, match="visible ASCII") as refused:
            api_token(home, env, create=False)
        assert token not in str(refused.value)


# --- the bind rule ---


@pytest.mark.spec("HP-SEC-1", "HP-SEC-3")
@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "[::1]", "localhost", "::ffff:127.0.0.1"])
def test_loopback_needs_no_strong_token(host: str) -> None:
    """Only this machine reaches a loopback address."""
    check_bind(host, "weak", False)


@pytest.mark.spec("HP-SEC-3")
@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "192.168.0.9", "localhost.example", "127.0.0.1.example", "workstation"]
)
def test_other_addresses_need_128_bits(host: str) -> None:
    """An address that others reach, or a name that could be one, needs a token of about 128 bits."""
    hexadecimal = "0123456789abcdef" * 2
    for token in ("", "hunter2", "x" * 64, "abcdefghijk0123456789", hexadecimal[:31], "0123456789" * 3):
        with pytest.raises(SettingsError, match="128 bits"):
            check_bind(host, token, False)
    for token in ("Zm9vYmFyYmF6cXV4MTIzNA", hexadecimal, "0123456789" * 4):
        check_bind(host, token, False)
    check_bind(host, "made by us", True)


@pytest.mark.spec("HP-SEC-4", "HP-ALN-3")
@pytest.mark.parametrize("entry", ["ftp://a.example", "a.example/path", "10.0.0.1/8", "ex*mple.com", "u@a.example", ""])
def test_an_entry_of_the_outbound_lists_that_cannot_be_read(entry: str) -> None:
    """A start with it would allow or deny something else than was meant."""
    (problem,) = _problems(f"policy: {{outbound: {{allow: ['*', '{entry}']}}}}")
    assert problem.startswith(f"policy.outbound.allow[1]: {entry!r}")
    assert "[SCHEME://]HOST[:PORT]" in problem or "http or https" in problem
