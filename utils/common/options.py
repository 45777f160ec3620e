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

Other names for an option are its `aliases`. A name whose values mean something else here stands in a group's table
`replaced`, with a function that translates them, or with a sentence that says what to use instead:

    class Lora:
        replaced: ClassVar[Replaced] = {"lora_size": "the size follows from --lora_rank"}
"""

import argparse
import difflib
import inspect
import json
import os
import sys
import traceback
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypedDict, TypeVar, Unpack

from utils.common.console import unfailing_console
from utils.common.errors import RunError, UserError
from utils.common.toml import check_paths, read_toml

T = TypeVar("T")

# A name that is no option: a function from what was given to options of the right type, or what to use instead.
Replaced = Mapping[str, str | Callable[[list[object]], dict[str, object]]]

ONLY_FLAGS = ("config", "debug")  # read too early for a config file to set them
OFF: tuple[object, ...] = (None, False, "", [])  # and 0, which equals False


class Facts(TypedDict, total=False):
    """What can be declared of an option beside its default and its help line."""

    choices: tuple[Any, ...]  # the values it may have
    const: Any  # the value of the flag given alone (`--gradient_checkpointing`); TOML's `true`. `false` is the default
    minimum: float | None
    maximum: float | None
    requires: str | None  # the option without which this one would be ignored
    affects_training: bool  # whether it affects what is learned, so that a resumed run must have the same value
    aliases: tuple[str, ...]  # other names that are accepted for it
    spellings: Mapping[str, Any]  # other words for its values, and what they mean
    is_path: bool  # whether a text is a path, or begins with one, as every Path is


UNDECLARED = Facts(
    choices=(),
    const=None,
    minimum=None,
    maximum=None,
    requires=None,
    affects_training=True,
    aliases=(),
    spellings={},
    is_path=False,
)


def option(default: Any, help: str, **facts: Unpack[Facts]) -> Any:
    """One option: its default, its help line, and what it may be (`Facts`)."""
    if unknown := facts.keys() - UNDECLARED.keys():
        raise TypeError(f"unknown facts of an option: {', '.join(unknown)}")
    default = Path(expand_home(str(default))) if isinstance(default, Path) else default
    return field(default=default, metadata={"help": help, **UNDECLARED, **facts})


def expand_home(path: str) -> str:
    """A path with the home folder instead of a leading ~ or ~user; unchanged where there is no such user."""
    try:
        return os.path.expanduser(path)
    except ValueError:  # no user can have this name
        return path


def parse_options(cls: type[T], argv: Sequence[str] | None = None) -> T:
    """The options of `cls` from `argv` (default: the command line): flags, else `--config FILE.toml`, else defaults.

    Raises UserError for an unknown name (with the nearest known one), a value of the wrong type or out of range, an
    option that would be ignored, and two names of one option with different values.
    """
    known = _Known.of(cls)
    namespace, unknown = _parser(cls, known).parse_known_args(argv)
    if unknown:
        name = unknown[0].split("=")[0]
        if not name.startswith("-"):
            raise UserError(f"unexpected argument {name!r} (see --help)")
        raise UserError(f"unknown option {name!r}{known.nearest(name.lstrip('-'), '--')}")
    flags = vars(namespace)
    if "debug" not in known.specs:
        flags.pop("debug", None)  # read by `run_script`
    given = known.translate(flags)
    if "config" in given:
        given = _config_values(known.convert("config", given["config"]), known) | given
    options = cls(**{name: known.convert(name, value) for name, value in given.items()})
    for name, spec in known.specs.items():
        required = spec.metadata["requires"]
        if required and getattr(options, name) != spec.default and not getattr(options, required):
            raise UserError(f"--{name} requires --{required}")
    return options


def convert_table(cls: type, values: dict[str, Any], where: str, file: Path | None = None) -> dict[str, Any]:
    """The values of a TOML table, converted to the types of the options of `cls`.

    Raises UserError as `parse_options` does; `where` names the table in its messages. With the `file` that the table
    is from, paths are checked for backslashes that were read as escapes.
    """
    known = _Known.of(cls)
    for name in values:
        if not known.accepts(name):
            raise UserError(f"unknown option {name!r} in {where}{known.nearest(name)}")
    try:
        given = known.translate(values)
        if file is not None:
            known.check_paths(given, file)
        return {name: known.convert(name, value) for name, value in given.items()}
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def to_json(options: Any) -> str:
    """Options as JSON text, with paths as strings."""
    return json.dumps(asdict(options), indent=2, default=str)


def to_table(options: Any) -> dict[str, Any]:
    """Options as JSON values, which can be compared with a table from a file."""
    return json.loads(to_json(options))


def training_table(options: Any) -> dict[str, Any]:
    """Of `to_table` the options that affect what is learned: what a saved state keeps."""
    specs = {spec.name: spec for spec in fields(options)}
    return {name: value for name, value in to_table(options).items() if specs[name].metadata["affects_training"]}


def training_differences(saved: Mapping[str, Any], options: Any) -> list[str]:
    """What affects training and differs from a table that `to_table` or `training_table` gave, a sentence for each.

    The table may come from another version of the program:

    - An option that it lacks did not exist then, and had the effect of today's default.
    - An option that was renamed is found by its alias, or translated as a config file's would be.
    - An option that no longer exists is a difference unless it was off (null, false, 0, or empty). What was off had
      no effect on the run; what was on had one, and cannot be had again here.
    """
    known = _Known.of(type(options))
    todays = {name: value for name, value in saved.items() if known.means_option(name)}
    before = {name: known.expand(name, given.value) for name, given in known.translate(todays).items()}
    differences = []
    for name, now in training_table(options).items():
        was = before[name] if name in before else _as_json(known.specs[name].default)
        if was != now:
            differences.append(f"--{name} was {was}, is {now}")
    gone = {name: value for name, value in saved.items() if name not in todays and value not in OFF}
    return [*differences, *(f"--{name} was {value}, and no longer exists" for name, value in gone.items())]


def run_script(main: Callable[[], None], bad_input: tuple[type[Exception], ...] = ()) -> int:
    """Runs a script's `main` and returns its exit code: 0 done, 1 failure, 2 bad input, 130 interrupted.

    UserError and the types in `bad_input` (2), RunError (1) and every other exception (1) become one message on
    stderr; with --debug on the command line each keeps its traceback. A console that goes away changes none of this.
    """
    with unfailing_console():
        try:
            main()
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
        except Exception as error:
            if "--debug" in sys.argv:
                traceback.print_exc()
            known = isinstance(error, (UserError, RunError, *bad_input))
            unexpected = f"{type(error).__name__}: {error}\nunexpected error; run again with --debug for a traceback"
            print(f"error: {error if known else unexpected}", file=sys.stderr)
            return 2 if known and not isinstance(error, RunError) else 1
    return 0


@dataclass(frozen=True)
class _Given:
    """A value as it was given, and the name that it was given by."""

    name: str
    value: Any


@dataclass(frozen=True)
class _Known:
    """The options of a class, and all names that are accepted for them."""

    specs: dict[str, Field]
    hints: dict[str, Any]
    aliases: dict[str, str]  # to the option's name
    replaced: Replaced

    @classmethod
    def of(cls, options: type) -> "_Known":
        specs = {spec.name: spec for spec in fields(options)}
        aliases = {alias: name for name, spec in specs.items() for alias in spec.metadata["aliases"]}
        tables = [vars(owner).get("replaced", {}) for owner in reversed(options.__mro__)]
        replaced = {name: rule for table in tables for name, rule in table.items()}
        return cls(specs, typing.get_type_hints(options), aliases, replaced)

    def accepts(self, name: str) -> bool:
        return name in self.specs or name in self.aliases or name in self.replaced

    def means_option(self, name: str) -> bool:
        """Whether values given by this name are values of options."""
        return self.accepts(name) and not isinstance(self.replaced.get(name), str)

    def is_path(self, name: str) -> bool:
        """Whether an option's values are paths."""
        return _shape(self.hints[name])[0] is Path or self.specs[name].metadata["is_path"]

    def expand(self, name: str, value: Any) -> Any:
        """A value with the home folder in its paths, if it is one: `convert` does the same."""
        if isinstance(value, list):
            return [self.expand(name, item) for item in value]
        return expand_home(value) if isinstance(value, str) and self.is_path(name) else value

    def check_paths(self, given: Mapping[str, _Given], file: Path) -> None:
        """Raises UserError as `check_paths` does, for the values of a file."""
        for name, value in given.items():
            if self.is_path(name):
                check_paths(value.value, value.name, file)

    def nearest(self, name: str, prefix: str = "") -> str:
        close = difflib.get_close_matches(name, [*self.specs, *self.aliases], n=1, cutoff=0.5)
        meant = [self.aliases.get(match, match) for match in close]
        return f"; did you mean {prefix + meant[0]!r}?" if meant else "; see --help for the known ones"

    def translate(self, values: Mapping[str, Any]) -> dict[str, _Given]:
        """What was given under accepted names, by the options' own names.

        Raises UserError for a name that was replaced by a sentence, and where two names contradict each other.
        """
        found: dict[str, _Given] = {}
        for name, value in values.items():
            for target, meant in self._meaning(name, value).items():
                given = _Given(name, meant)
                other = found.setdefault(target, given)
                if other is not given and self.convert(target, other) != self.convert(target, given):
                    raise UserError(f"--{other.name} and --{name} have different values: give one of them")
        return found

    def _meaning(self, name: str, value: object) -> dict[str, object]:
        rule = self.replaced.get(name)
        if rule is None:
            return {self.aliases.get(name, name): value}
        if isinstance(rule, str):
            raise UserError(f"--{name} does not exist here: {rule}")
        return rule(value if isinstance(value, list) else [value])

    def convert(self, name: str, given: _Given) -> Any:
        """The value as the option's type. Raises UserError for one that it cannot have."""
        spec, (scalar, many, _) = self.specs[name], _shape(self.hints[name])
        value = given.value
        if spec.metadata["const"] is not None and isinstance(value, bool):
            return spec.metadata["const"] if value else spec.default
        if many:
            values = value if isinstance(value, list | tuple) else [value]
            if not values and spec.default:
                raise UserError(f"--{given.name} needs at least one value")
            return tuple(_convert_scalar(spec, scalar, _Given(given.name, item)) for item in values)
        return _convert_scalar(spec, scalar, given)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise UserError(f"{message} (see --help)")


def _parser(cls: type, known: _Known) -> _Parser:
    also = [f"--{alias} for --{name}" for alias, name in known.aliases.items()]
    also += [f"--{name}" for name, rule in known.replaced.items() if not isinstance(rule, str)]
    epilog = f"Also accepted: {', '.join(also)}." if also else None
    parser = _Parser(usage="%(prog)s [options]", description=cls.__doc__, epilog=epilog, allow_abbrev=False)
    for owner in (*cls.__mro__[1:], cls):
        names = [name for name in inspect.get_annotations(owner) if name in known.specs]
        if names:
            group = parser.add_argument_group(owner.__doc__ if owner is not cls else None)
            for name in names:
                _add_argument(group, known.specs[name], known.hints[name])
    if "debug" not in known.specs:
        parser.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help="show where an error came from"
        )
    for name in known.replaced:
        parser.add_argument(f"--{name}", nargs="*", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    return parser


def _add_argument(group: argparse._ArgumentGroup, spec: Field, hint: Any) -> None:
    scalar, many, _ = _shape(hint)
    meta = spec.metadata
    shown = spec.default if not isinstance(spec.default, tuple) else " ".join(map(str, spec.default))
    text = meta["help"] if shown is None or shown is False or shown == "" else f"{meta['help']} (default: {shown})"
    settings: dict[str, Any] = {"default": argparse.SUPPRESS}
    if scalar is bool:
        settings["action"] = argparse.BooleanOptionalAction
    else:
        choices = ",".join(map(str, meta["choices"]))
        settings["metavar"] = f"{{{choices}}}" if choices else scalar.__name__.upper()
        if many:
            settings["nargs"] = "+"
        elif meta["const"] is not None:
            settings |= {"nargs": "?", "const": meta["const"]}
    group.add_argument(f"--{spec.name}", help=text.replace("%", "%%"), **settings)
    for alias in meta["aliases"]:
        group.add_argument(f"--{alias}", help=argparse.SUPPRESS, **settings)


def _shape(hint: Any) -> tuple[type, bool, bool]:
    """(scalar type, is it a tuple, may it be None) of an annotation."""
    optional = False
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        optional = True
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0], True, optional
    return hint, False, optional


def _convert_scalar(spec: Field, scalar: type, given: _Given) -> Any:
    meta, name, value = spec.metadata, given.name, given.value
    wrong = UserError(f"--{name} must be of type {scalar.__name__}, not {value!r}")
    # int(True) and int(2.5) succeed in Python; a config file that says so is mistaken.
    numbers = (int, float, str)
    allowed = {bool: (bool,), int: (int, str), float: numbers, str: numbers}.get(scalar, (str, Path))
    if not isinstance(value, allowed) or (isinstance(value, bool) and scalar is not bool):
        raise wrong
    if scalar is Path and not str(value):
        raise UserError(f"--{name} is empty: it must be a path")
    if scalar is Path or meta["is_path"]:
        value = expand_home(str(value))
    try:
        converted = scalar(value)
    except ValueError:
        raise wrong from None
    converted = meta["spellings"].get(str(converted).lower(), converted)
    if meta["choices"] and converted not in meta["choices"]:
        raise UserError(f"--{name} must be one of {', '.join(map(str, meta['choices']))}, not {value!r}")
    if meta["minimum"] is not None and not converted >= meta["minimum"]:
        raise UserError(f"--{name} must be at least {meta['minimum']}, not {value!r}")
    if meta["maximum"] is not None and not converted <= meta["maximum"]:
        raise UserError(f"--{name} must be at most {meta['maximum']}, not {value!r}")
    return converted


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


def _config_values(path: Path, known: _Known) -> dict[str, _Given]:
    """A config file's values. Where its `dataset` is a list of tables, the file is the dataset config too."""
    values = read_toml(path)
    for name in values:
        if not known.accepts(name) or name in ONLY_FLAGS:
            raise UserError(f"unknown option {name!r} in {path}{known.nearest(name)}")
    if isinstance(values.get("dataset"), dict):
        raise UserError(f"{path}: write [[dataset]] with two brackets on each side, as there may be several")
    has_tables = isinstance(values.get("dataset"), list) and "dataset_config" in known.specs
    if has_tables:
        del values["dataset"]
    given = known.translate(values)
    known.check_paths(given, path)
    return given | ({"dataset_config": _Given("dataset_config", str(path))} if has_tables else {})
