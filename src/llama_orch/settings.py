"""The configuration file, the home folder and the API token: what a start reads, checked before anything runs.

Invariant: what this module hands out is served as it says. Unknown keys, values out of range, contradictions and
settings of parts that this version does not build are refused by name; nothing is ignored in silence (HP-ALN-3).
"""

from __future__ import annotations

import difflib
import ipaddress
import math
import os
import re
import secrets
import stat
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec

from llama_orch.contract.config import DeviceSettings, LlamacppSettings, PoolSettings, Settings
from llama_orch.device_checks import are_on_one_card, device_problems
from llama_orch.policy.rules import list_problems
from llama_orch.remote_checks import remote_pool_problems, server_problems
from llama_orch.remote_references import SCHEME
from llama_orch.strict_yaml import StrictYamlError, parse_yaml

FILE_BYTES_MAX = 1 << 20
ENGINES = ("llamacpp", "ctransformers", "openai", "simulated")
REPLICA_CTX_MAX = 1 << 24  # slots x ctx of one replica, in tokens
TOKEN_BITS_MIN = 128  # for a bind that other machines reach (HP-SEC-3)
TOKEN_CHARS_MIN = 16
KEY_CHARS_MIN = 8  # of a key for a server elsewhere
_TOKEN_DISTINCT_MIN = 8
_TOKEN_BYTES_MAX = 4096


class SettingsError(Exception):
    """The configuration, the home folder or the token cannot be used. `problems` are sentences for the user."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


# --- the configuration file ---------------------------------------------------------------------------------------


def load_settings(path: Path | None, env: Mapping[str, str]) -> Settings:
    """The checked settings of `path`, else of the file that LLORCH_CONFIG names, else the defaults."""
    if path is None and env.get("LLORCH_CONFIG"):
        path = Path(env["LLORCH_CONFIG"])
    return Settings() if path is None else parse_settings(_read_text(path), str(path))


def parse_settings(text: str, name: str) -> Settings:
    """The checked settings of a YAML text; `name` is what problems call it."""
    try:
        data = parse_yaml(text)
    except StrictYamlError as error:
        line = "" if error.line is None else f":{error.line}"
        raise SettingsError([f"{name}{line}: {error}"]) from error
    data = {} if data is None else data
    problems = _type_problems(data, Settings, "")
    if not problems:
        settings = msgspec.convert(data, Settings)
        problems = check_settings(settings)
        if not problems:
            return settings
    raise SettingsError([f"{name}: {problem}" for problem in problems])


def _read_text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(FILE_BYTES_MAX + 1)
        if len(content) > FILE_BYTES_MAX:
            raise SettingsError([f"{path}: the file is larger than {FILE_BYTES_MAX} bytes"])
        return content.decode("utf-8-sig")
    except OSError as error:
        raise SettingsError([f"{path}: cannot be read: {error.strerror}"]) from error
    except UnicodeDecodeError as error:
        raise SettingsError([f"{path}: is not UTF-8 text (byte {error.start})"]) from error


# --- types and unknown keys, all problems at once -----------------------------------------------------------------


def _type_problems(value: Any, hint: Any, path: str) -> list[str]:
    """What is wrong with `value` as a `hint`: its parts first, then itself."""
    problems: list[str] = []
    for alternative in _alternatives(hint):
        if isinstance(value, dict):
            problems += _mapping_problems(value, alternative, path)
        elif isinstance(value, list) and get_origin(alternative) is list:
            (item,) = get_args(alternative)
            for index, part in enumerate(value):
                problems += _type_problems(part, item, f"{path}[{index}]")
    return problems or _own_problems(value, hint, path)


def _mapping_problems(value: dict[Any, Any], hint: Any, path: str) -> Iterator[str]:
    if get_origin(hint) is dict:
        parts = dict.fromkeys(value, get_args(hint)[1])
    elif isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        parts = get_type_hints(hint, include_extras=True)
    else:
        return
    for key, part in value.items():
        where = f"{path}.{key}" if path else str(key)
        if not isinstance(key, str):
            yield f"{where}: keys are text; quote this one"
        elif key not in parts:
            yield f"{where[:200]}: unknown key; {_nearest(key, list(parts))}"
        else:
            yield from _type_problems(part, parts[key], where)


def _nearest(key: str, known: list[str]) -> str:
    if not known:
        return "this section has no keys"
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"


def _own_problems(value: Any, hint: Any, path: str) -> list[str]:
    if isinstance(value, float) and not math.isfinite(value):
        return [f"{path}: is not a finite number"]
    try:
        msgspec.convert(value, hint)
    except msgspec.ValidationError as error:
        message, _, suffix = str(error).partition(" - at `$")
        where = path + suffix.rstrip("`") or "the file"
        message += f"; one of: {', '.join(choices)}" if (choices := _choices(hint)) else ""
        # YAML 1.1, which PyYAML reads, takes these words for truth values.
        message += "; quote off, on, yes and no where text is meant" if isinstance(value, bool) else ""
        return [f"{where}: {message}"]
    return []


def _alternatives(hint: Any) -> list[Any]:
    """`hint` without its constraints, and a union as its members."""
    if get_origin(hint) is Annotated:
        return _alternatives(get_args(hint)[0])
    if get_origin(hint) in (Union, types.UnionType):
        return [part for member in get_args(hint) for part in _alternatives(member)]
    return [hint]


def _choices(hint: Any) -> list[str]:
    """The words that a value may be, and the other kinds that it may have besides; empty where it is free."""
    alternatives = _alternatives(hint)
    words = [str(word) for part in alternatives if get_origin(part) is Literal for word in get_args(part)]
    kinds = [
        "a list" if get_origin(part) is list else "a number" for part in alternatives if get_origin(part) != Literal
    ]
    return words + kinds if words else []


# --- what no single value shows -----------------------------------------------------------------------------------


def check_settings(settings: Settings) -> list[str]:
    """Contradictions between values, and values that this version does not serve; empty when there is none."""
    devices = [] if isinstance(settings.devices, str) else settings.devices
    problems = [*_repeated("devices", "id", [device.id for device in devices])]
    problems += device_problems(devices)
    problems += _llamacpp_problems(settings.engines.llamacpp)
    problems += server_problems(settings.engines.openai.servers)
    problems += _repeated("engines.openai.servers", "name", [one.name for one in settings.engines.openai.servers])
    problems += _repeated("pools", "id", [pool.id for pool in settings.pools])
    for index, pool in enumerate(settings.pools):
        where = f"pools[{index}]"
        problems += _pool_problems(where, pool, settings)
        problems += _pool_device_problems(where, pool, None if settings.devices == "auto" else devices)
    for index, root in enumerate(settings.catalog.file_roots):
        if not Path(root).expanduser().is_absolute():
            problems.append(f"catalog.file_roots[{index}]: {root!r} is no absolute path")
    problems += list_problems(settings.policy.outbound)
    return problems


def _repeated(section: str, key: str, values: list[str]) -> Iterator[str]:
    for value in sorted({value for value in values if values.count(value) > 1}):
        yield f"{section}: the {key} {value!r} is given more than once"


def _llamacpp_problems(llamacpp: LlamacppSettings) -> Iterator[str]:
    where = "engines.llamacpp"
    if llamacpp.launcher == "binary" and not llamacpp.binary:
        yield f"{where}.binary: launcher 'binary' needs the path of your llama-server"
    if llamacpp.launcher == "embedded" and llamacpp.binary is not None:
        yield f"{where}.binary: is used with launcher 'binary' only; leave it out"
    if llamacpp.launcher == "embedded" and llamacpp.extra_args:
        yield f"{where}.extra_args: are used with launcher 'binary' only; leave them out"


def _pool_problems(where: str, pool: PoolSettings, settings: Settings) -> Iterator[str]:
    if pool.engine not in ENGINES:
        yield f"{where}.engine: there is no engine {pool.engine!r}; known: {', '.join(ENGINES)}"
    is_remote = pool.engine == "openai"
    if is_remote or pool.model.startswith(SCHEME):
        yield from remote_pool_problems(where, pool, settings.engines.openai.servers)
    elif problem := model_problem(pool.model):
        yield f"{where}.model: {problem}"
    if pool.sampler_profile_version not in settings.sampler_profiles:
        known = ", ".join(settings.sampler_profiles)
        yield f"{where}.sampler_profile_version: there is no profile {pool.sampler_profile_version!r}; known: {known}"
    if pool.max_tokens > pool.ctx and not is_remote:
        yield f"{where}.max_tokens: {pool.max_tokens} is more than the ctx of a slot, {pool.ctx}"
    if pool.slots * pool.ctx > REPLICA_CTX_MAX:
        yield f"{where}: slots x ctx is {pool.slots * pool.ctx} tokens; a replica takes at most {REPLICA_CTX_MAX}"


def model_problem(reference: str) -> str | None:
    """Why a pool cannot serve this model reference in this version; None when it can try."""
    kind, _, rest = reference.partition(":")
    if kind == "builtin" and re.fullmatch(r"[A-Za-z0-9._-]{1,64}", rest):
        return None
    if kind == "file" and rest and "\0" not in rest:
        return None
    served = "use builtin:tiny, file: and the path of a GGUF file, or a model of the catalog"
    if kind in ("builtin", "file"):
        return f"{reference!r} is incomplete; {served}"
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}|sha256:[0-9a-f]{64}", reference):
        return None  # whether the catalog has it is seen at the start
    if kind in ("hf", "https", "http") and rest:
        return f"{kind}: references are not built in this version; {served}"
    return f"{reference!r} is no model reference; {served}"


def _pool_device_problems(where: str, pool: PoolSettings, devices: list[DeviceSettings] | None) -> Iterator[str]:
    """`devices` is None where the driver names them: what they are called is known only then."""
    ids = [] if isinstance(pool.devices, str) else pool.devices
    yield from _repeated(f"{where}.devices", "id", ids)
    known = None if devices is None else [device.id for device in devices]
    for missing in [id for id in dict.fromkeys(ids) if known is not None and id not in known]:
        yield f"{where}.devices: there is no device {missing!r}; known: {', '.join(known or [])}"
    if pool.tensor_split is None:
        return
    if len(ids) < 2:
        yield f"{where}.tensor_split: splits over several devices; name them in {where}.devices"
    elif len(pool.tensor_split) != len(ids):
        yield f"{where}.tensor_split: has {len(pool.tensor_split)} shares for {len(ids)} devices"
    if not sum(pool.tensor_split) > 0:
        yield f"{where}.tensor_split: the shares add up to nothing"
    if pool.replicas not in ("auto", 1):
        yield f"{where}.replicas: a replica that is split over the pool's devices is its only one"
    if are_on_one_card(ids, devices or []):  # a mask that names a card twice leaves the worker without any
        yield f"{where}.tensor_split: splits over several cards; some of these devices are on the same one"


# --- home folder and token ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Home:
    """The folder of this installation's state. Made so that only its user may enter it; one that exists keeps its mode,
    and what is secret in it has a mode of its own."""

    path: Path

    @classmethod
    def of(cls, env: Mapping[str, str]) -> Home:
        """LLORCH_HOME, else `llama-orch` in the XDG data folder."""
        if env.get("LLORCH_HOME"):
            return cls(Path(env["LLORCH_HOME"]).expanduser().absolute())
        data = env.get("XDG_DATA_HOME", "")
        if not os.path.isabs(data):  # the XDG specification: relative ones are ignored
            data = os.path.join(env.get("HOME") or os.path.expanduser("~"), ".local", "share")
        return cls(Path(data) / "llama-orch")

    @property
    def token_file(self) -> Path:
        return self.path / "token"

    def create(self) -> Home:
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise SettingsError([f"{self.path}: cannot be made: {error.strerror}; set LLORCH_HOME"]) from error
        return self


TokenSource = Literal["environment", "file", "generated"]


def api_token(home: Home, env: Mapping[str, str], create: bool) -> tuple[str, TokenSource]:
    """The shared token and where it came from: LLORCH_API_TOKEN, else the home folder's file, else a fresh one."""
    if env.get("LLORCH_API_TOKEN"):
        return _checked_token(env["LLORCH_API_TOKEN"], "LLORCH_API_TOKEN"), "environment"
    try:
        token = _read_token(home.token_file)
        if token is not None:
            return token, "file"
        if create:
            return _write_token(home.create().token_file)
    except OSError as error:
        raise SettingsError([f"{home.token_file}: {error.strerror}; set LLORCH_HOME or LLORCH_API_TOKEN"]) from error
    problem = f"there is no token: set LLORCH_API_TOKEN, or start `llama-orch serve`, which makes {home.token_file}"
    raise SettingsError([problem])


def check_bind(host: str, token: str, token_is_generated: bool) -> None:
    """Refuse an address that other machines reach unless the token has about 128 bits (HP-SEC-3).

    Its bits are estimated: 3.3 a character for digits alone, 4 for hex digits, 6 for anything else, and none when it
    has fewer than 8 different characters. So 22 characters of base64 or 32 of hex are enough.
    """
    if is_loopback(host) or token_is_generated or _token_bits(token) >= TOKEN_BITS_MIN:
        return
    problem = (
        f"{host} can be reached from other machines, and the token has less than {TOKEN_BITS_MIN} bits: "
        "bind to 127.0.0.1, or set LLORCH_API_TOKEN to at least 22 random characters (openssl rand -base64 32)"
    )
    raise SettingsError([problem])


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address. A name other than localhost could resolve to anything."""
    try:
        address = ipaddress.ip_address(host.strip("[]").partition("%")[0])
    except ValueError:
        return host == "localhost"
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def _token_bits(token: str) -> float:
    if len(set(token)) < _TOKEN_DISTINCT_MIN:
        return 0.0
    alphabet = next((size for size, chars in ((10, r"\d+"), (16, r"[\da-fA-F]+")) if re.fullmatch(chars, token)), 64)
    return len(token) * math.log2(alphabet)


def _checked_token(token: str, name: str) -> str:
    if not re.fullmatch(r"[\x21-\x7e]+", token):
        raise SettingsError([f"{name}: a token is one line of visible ASCII characters without spaces"])
    if len(token) < TOKEN_CHARS_MIN:  # a shorter one could not be told from other text when logs are cleaned of it
        raise SettingsError([f"{name}: a token has at least {TOKEN_CHARS_MIN} characters; this one has {len(token)}"])
    return token


def _read_token(path: Path) -> str | None:
    """The file's token; None without a file."""
    try:
        return _checked_token(_read_private(path, "token"), str(path))
    except FileNotFoundError:
        return None


def read_key(path: Path) -> str:
    """The key that the file holds. Raises SettingsError."""
    try:
        key = _read_private(path, "key")
    except OSError as error:
        raise SettingsError([f"{path}: cannot be read: {error.strerror}"]) from error
    if not re.fullmatch(rf"[\x21-\x7e]{{{KEY_CHARS_MIN},}}", key):  # shorter: see _checked_token
        raise SettingsError(
            [f"{path}: a key is one line of at least {KEY_CHARS_MIN} visible ASCII characters without spaces"]
        )
    return key


def _read_private(path: Path, what: str) -> str:
    """One line of a file. Links are not followed; what others can read is no secret."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        entry = os.fstat(descriptor)
        if not stat.S_ISREG(entry.st_mode) or entry.st_uid != os.geteuid():
            hint = "; remove it and a new token is made" if what == "token" else ""
            raise SettingsError([f"{path}: is not a file of yours{hint}"])
        if stat.S_IMODE(entry.st_mode) & 0o077:
            raise SettingsError([f"{path}: other users can read the {what}; run: chmod 600 {path}"])
        content = file.read(_TOKEN_BYTES_MAX)
    return content.decode("ascii", "replace").removesuffix("\n")


def _write_token(path: Path) -> tuple[str, TokenSource]:
    """Make the file whole or not at all. Of several processes one wins, and the others take its token."""
    token = secrets.token_urlsafe(32)
    draft = path.with_name(f".token-{secrets.token_hex(8)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with open(descriptor, "w", encoding="ascii") as file:
            file.write(token + "\n")
            file.flush()
            os.fsync(descriptor)
        os.link(draft, path)  # unlike a rename, this never replaces what is there
    except FileExistsError:
        return _read_token(path) or token, "file"
    finally:
        draft.unlink()
    return token, "generated"
