"""Options are frozen dataclasses; this file turns them into a command line and reads the same names from TOML.

A script declares its options in groups, one line each, and joins the groups by inheritance:

    @dataclass(frozen=True)
    class Lora:
        "LoRA"
        lora_rank: int = option(16, "rank of the LoRA matrices", minimum=1)

    @dataclass(frozen=True)
    class Options(Data, Lora):
        "Train a LoRA."

Supported types: bool, int, float, str, Path, `T | None` and `tuple[T, ...]` of these.
"""

import argparse
import difflib
import io
import json
import sys
import tomllib
import traceback
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import Field, asdict, field, fields
from pathlib import Path
from typing import Any, TypeVar

from utils.common.errors import RunError, UserError

T = TypeVar("T")

ONLY_FLAGS = ("config", "debug")  # what a config file cannot say: it is read too late for them


def option(
    default: Any,
    help: str,
    *,
    choices: tuple = (),
    const: Any = None,
    minimum: float | None = None,
    maximum: float | None = None,
    requires: str | None = None,
    affects_training: bool = True,
) -> Any:
    """One option: its default, its help line, and what it may be.

    `const` is the value of the flag given without one (`--gradient_checkpointing`), which `true` means in TOML;
    `false` there means the default. `requires` names the option without which this one would be ignored.
    """
    facts = {"help": help, "choices": choices, "const": const, "requires": requires, "minimum": minimum}
    facts |= {"maximum": maximum, "affects_training": affects_training}
    return field(default=default, metadata=facts)


def parse_options(cls: type[T], argv: Sequence[str] | None = None) -> T:
    """The options of `cls` from `argv` (default: the command line), flags over `--config FILE.toml` over defaults.

    Raises UserError for an unknown name (with the nearest known one), a value of the wrong type or out of range, and
    for an option that would be ignored.
    """
    specs = {spec.name: spec for spec in fields(cls)}
    hints = typing.get_type_hints(cls)
    namespace, unknown = _parser(cls, specs, hints).parse_known_args(argv)
    if unknown:
        name = unknown[0].split("=")[0]
        if not name.startswith("-"):
            raise UserError(f"{name!r} stands without an option before it (see --help)")
        raise UserError(f"unknown option {name!r}{_nearest(name.lstrip('-'), specs, '--')}")
    given = vars(namespace)
    if given.get("config") is not None:
        given = _config_values(Path(given["config"]), specs) | given
    options = cls(**{name: _convert(specs[name], hints[name], value) for name, value in given.items()})
    for name, spec in specs.items():
        required = spec.metadata["requires"]
        if required and getattr(options, name) != spec.default and not getattr(options, required):
            raise UserError(f"--{name} means nothing without --{required}")
    return options


def read_toml(path: Path) -> dict[str, Any]:
    """What a TOML file says. Raises UserError where it cannot be read or is none."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the config file {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a valid TOML file: {error}") from None


def convert_table(cls: type, values: dict[str, Any], where: str) -> dict[str, Any]:
    """The values of a TOML table as the options `cls` of the same names take them.

    Raises UserError as `parse_options` does; `where` says in its messages which table it was.
    """
    specs = {spec.name: spec for spec in fields(cls)}
    hints = typing.get_type_hints(cls)
    for name in values:
        if name not in specs:
            raise UserError(f"unknown option {name!r} in {where}{_nearest(name, specs, '')}")
    try:
        return {name: _convert(specs[name], hints[name], value) for name, value in values.items()}
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def to_json(options: Any) -> str:
    """Options as JSON text, paths as strings."""
    return json.dumps(asdict(options), indent=2, default=str)


def to_table(options: Any) -> dict[str, Any]:
    """Options as `to_json` writes them, read again: what can be compared with a table from a file."""
    return json.loads(to_json(options))


def training_options(options: Any) -> dict[str, Any]:
    """The options that affect training, as `to_table` gives them."""
    return {name: value for name, value in to_table(options).items() if _affects(type(options), name)}


def _affects(cls: type, name: str) -> bool:
    return next((spec.metadata["affects_training"] for spec in fields(cls) if spec.name == name), True)


def option_changes(options: Any, saved: dict[str, Any]) -> list[str]:
    """What differs."""
    now = training_options(options)
    defaults = json.loads(json.dumps({spec.name: spec.default for spec in fields(options)}, default=str))
    changes = []
    for name in dict.fromkeys([*saved, *now]):
        if not _affects(type(options), name):
            continue
        if name not in now:
            changes.append(f"--{name} is gone")
        elif saved.get(name, defaults[name]) != now[name]:
            changes.append(f"--{name} was {saved.get(name, defaults[name])}, is {now[name]}")
    return changes


def run_script(main: Callable[[], None], bad_input: tuple[type[Exception], ...] = ()) -> int:
    """Runs a script's `main` and returns its exit code: 0 done, 1 failure, 2 bad input, 130 interrupted.

    UserError and the types in `bad_input` (2) and RunError (1) become one message on stderr, and so does any other
    exception (1): with --debug on the command line each keeps its traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(
                errors="backslashreplace"
            )  # a caption or a file name the terminal cannot show is no error
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if "--debug" in sys.argv:
            traceback.print_exc()
        known = isinstance(error, (UserError, RunError, *bad_input))
        shown = error if known else f"{type(error).__name__}: {error}\nthis is not foreseen: --debug shows where it was"
        print(f"error: {shown}", file=sys.stderr)
        return 2 if known and not isinstance(error, RunError) else 1
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise UserError(f"{message} (see --help)")


def _parser(cls: type, specs: dict[str, Field], hints: dict[str, Any]) -> _Parser:
    parser = _Parser(usage="%(prog)s [options]", description=cls.__doc__, allow_abbrev=False)
    for owner in (*cls.__mro__[1:], cls):
        names = [name for name in vars(owner).get("__annotations__", {}) if name in specs]
        if names:
            group = parser.add_argument_group(owner.__doc__ if owner is not cls else None)
            for name in names:
                _add_argument(group, specs[name], hints[name])
    return parser


def _add_argument(group: argparse._ArgumentGroup, spec: Field, hint: Any) -> None:
    scalar, many, _ = _shape(hint)
    meta = spec.metadata
    shown = spec.default if not isinstance(spec.default, tuple) else " ".join(map(str, spec.default))
    text = meta["help"] if shown is None or shown is False or shown == "" else f"{meta['help']} (default: {shown})"
    settings: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text.replace("%", "%%")}
    if scalar is bool:
        settings["action"] = argparse.BooleanOptionalAction
    else:
        choices = ",".join(map(str, meta["choices"]))
        settings["metavar"] = f"{{{choices}}}" if choices else scalar.__name__.upper()
        if many:
            settings["nargs"] = "+"
        elif meta["const"] is not None:
            settings |= {"nargs": "?", "const": meta["const"]}
    group.add_argument(f"--{spec.name}", **settings)


def _shape(hint: Any) -> tuple[type, bool, bool]:
    """(scalar type, is it a tuple, may it be None) of an annotation."""
    optional = False
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        optional = True
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0], True, optional
    return hint, False, optional


def _convert(spec: Field, hint: Any, value: Any) -> Any:
    scalar, many, _ = _shape(hint)
    if spec.metadata["const"] is not None and isinstance(value, bool):
        return spec.metadata["const"] if value else spec.default
    if many:
        values = value if isinstance(value, list | tuple) else [value]
        if not values and spec.default:
            raise UserError(f"--{spec.name} needs at least one value")
        return tuple(_convert_scalar(spec, scalar, item) for item in values)
    return _convert_scalar(spec, scalar, value)


def _convert_scalar(spec: Field, scalar: type, value: Any) -> Any:
    meta = spec.metadata
    wrong = UserError(f"--{spec.name} must be of type {scalar.__name__}, not {value!r}")
    # int(True) and int(2.5) succeed in Python; a config file that says so is mistaken.
    numbers = (int, float, str)
    allowed = {bool: (bool,), int: (int, str), float: numbers, str: numbers}.get(scalar, (str, Path))
    if not isinstance(value, allowed) or (isinstance(value, bool) and scalar is not bool):
        raise wrong
    try:
        converted = scalar(value)
    except ValueError:
        raise wrong from None
    if meta["choices"] and converted not in meta["choices"]:
        raise UserError(f"--{spec.name} must be one of {', '.join(map(str, meta['choices']))}, not {value!r}")
    if meta["minimum"] is not None and not converted >= meta["minimum"]:
        raise UserError(f"--{spec.name} must be at least {meta['minimum']}, not {value!r}")
    if meta["maximum"] is not None and not converted <= meta["maximum"]:
        raise UserError(f"--{spec.name} must be at most {meta['maximum']}, not {value!r}")
    return converted


def _nearest(name: str, specs: dict[str, Field], prefix: str) -> str:
    close = difflib.get_close_matches(name, specs, n=1, cutoff=0.5)
    return f"; did you mean {prefix + close[0]!r}?" if close else "; see --help for the known ones"


def _config_values(path: Path, specs: dict[str, Field]) -> dict[str, Any]:
    """A config file's values; where its `dataset` is a list of tables, the file is the dataset config too."""
    values = read_toml(path)
    for name in values:
        if name not in specs or name in ONLY_FLAGS:
            raise UserError(f"unknown option {name!r} in {path}{_nearest(name, specs, '')}")
    if isinstance(values.get("dataset"), dict):
        raise UserError(f"{path}: a [dataset] has two brackets on each side, [[dataset]], as there may be several")
    if isinstance(values.get("dataset"), list) and "dataset_config" in specs:
        del values["dataset"]
        values["dataset_config"] = str(path)
    return values
