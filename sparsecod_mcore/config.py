"""YAML configurations and the command line are one: every key is a flag, every flag can be a key.

A configuration holds Megatron's flags with underscores (``num_layers: 16``) and this project's in a ``cod:`` block
(``cod: {stats_interval: 1}`` is ``--cod-stats-interval 1``). It is turned into arguments that stand before those of the
command line, which therefore win.
"""

import argparse
import functools
import re
from collections.abc import Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn

import yaml
from megatron.training.arguments import add_megatron_arguments

from sparsecod_mcore import platform
from sparsecod_mcore.errors import UserError, nearest
from sparsecod_mcore.model import depth_control


def add_cod_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add this project's flags, set what a machine without CUDA needs, and make errors one sentence."""
    group = parser.add_argument_group("sparsecod_mcore")
    group.add_argument("--config", help="YAML of flags; what is given on the command line wins.")
    group.add_argument("--cod-run-dir", help="Where everything of the run goes; default runs/<name of the config>.")
    group.add_argument(
        "--cod-stats-interval",
        type=_non_negative,
        default=1,
        help="Measure every n-th step; 0 measures none. Default: every step.",
    )
    group.add_argument(
        "--cod-kurtosis-interval",
        type=_non_negative,
        default=100,
        help="Of the measured steps, those that are multiples of n also measure single dimensions of the residual "
        "stream (kurtosis, Eq. 19 and 20); 0 for none. Default: 100.",
    )
    group.add_argument(
        "--cod-jacobian-interval",
        type=_non_negative,
        default=100,
        help="Probe the Jacobian of every layer at every n-th step, on one microbatch; 0 for never. Default: 100.",
    )
    group.add_argument(
        "--cod-jacobian-probes",
        type=_positive,
        default=4,
        help="Directions of each kind that a layer is probed in. Default: 4.",
    )
    group.add_argument(
        "--cod-jacobian-directions",
        choices=["noise", "residual"],
        default="noise",
        help="Random directions only, or also that of the residual stream itself. Default: noise.",
    )
    group.add_argument(
        "--cod-full-width-qk-norm",
        action="store_true",
        help="With --qk-layernorm: normalise the queries of all heads together, and the keys, as OLMoE does.",
    )
    group.add_argument(
        "--cod-depth-control",
        type=depth_control.kind_of,
        default=depth_control.DEFAULT_KIND,
        metavar="KIND",
        help=f"Explicit remedy for variance that grows with depth, one of {', '.join(depth_control.KINDS)}. Default: "
        "scaled_init, as Megatron has it.",
    )
    group.add_argument(
        "--cod-mix-ln-share",
        type=depth_control.share_of,
        default=depth_control.DEFAULT_POST_NORM_SHARE,
        help="Share of the layers, from the first, that mix_ln gives post-norm. Default: 0.25.",
    )
    group.add_argument(
        "--cod-profile",
        choices=["torch", "nsys", "dlprof"],
        help="Profile steps --profile-step-start to --profile-step-end with this tool, and summarise it.",
    )
    group.add_argument(
        "--cod-skip-non-finite",
        type=_non_negative,
        default=0,
        help="Skip up to n steps in a row whose loss or gradients are not finite, before stopping. Default: 0, stop.",
    )
    group.add_argument(
        "--cod-data", help="Prefix of a dataset made by tools/preprocess_data.py: its train and valid parts."
    )
    group.add_argument(
        "--cod-verbose",
        action="store_true",
        help="Show what Megatron prints, instead of filing it in the run directory.",
    )
    group.add_argument("--cod-tokenizer", help="The tokenizer.json that the dataset was made with.")
    # The monitor finds what is not finite, and names the layer; a run is always saved, also when it is told to end.
    parser.set_defaults(rerun_mode="disabled", check_for_nan_in_loss_and_grad=False, save_interval=1000)
    parser.set_defaults(exit_signal_handler=True)
    if not platform.has_gpu():
        parser.set_defaults(distributed_backend="gloo")
    if not platform.has_transformer_engine():
        parser.set_defaults(**platform.LOCAL_DEFAULTS)
    parser.error = lambda message: _refuse(parser, message)  # type: ignore[method-assign]
    _mend_help(parser)
    return parser


def _mend_help(parser: argparse.ArgumentParser) -> None:
    """Some of Megatron's texts have a percent sign that argparse takes for a placeholder, and --help fails on it."""
    formatter = parser._get_formatter()
    for action in parser._actions:
        try:
            formatter._expand_help(action)
        except (ValueError, TypeError, KeyError):
            action.help = str(action.help).replace("%", "%%")


def _at_least(least: int, text: str) -> int:
    value = int(text)
    if value < least:
        raise argparse.ArgumentTypeError(f"{value} is given, {least} or more is accepted")
    return value


def _non_negative(text: str) -> int:
    return _at_least(0, text)


def _positive(text: str) -> int:
    return _at_least(1, text)


def _refuse(parser: argparse.ArgumentParser, message: str) -> NoReturn:
    unknown = message.removeprefix("unrecognized arguments: ")
    if unknown != message:
        flag = next((word for word in unknown.split() if word.startswith("--")), unknown)
        raise UserError(f"{flag} is no flag of this program{nearest(flag, parser._option_string_actions)}")
    raise UserError(message)


def build_parser() -> argparse.ArgumentParser:
    """The parser of every flag that a configuration or a command line may use."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    return add_cod_arguments(add_megatron_arguments(parser))


def with_config(argv: Sequence[str]) -> list[str]:
    """Return `argv` with the flags of its ``--config`` file, if it names one, set before its own."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config", type=Path)
    path = finder.parse_known_args(argv)[0].config
    return list(argv) if path is None else [*_flags_of(path), *argv]


def _flags_of(path: Path) -> Iterator[str]:
    flag_of_key = _known_keys()
    for key, value in read_config(path).items():
        if key not in flag_of_key:
            raise UserError(f"{path}: {key!r} is no known key{nearest(key, flag_of_key)}")
        yield from _as_flag(path, key, value, flag_of_key[key])


def read_config(path: Path) -> dict[str, Any]:
    """Read a configuration as one flat mapping; keys of the ``cod:`` block are prefixed with ``cod.``."""
    try:
        content = yaml.load(path.read_text(), Loader=ConfigLoader)
    except OSError as error:
        raise UserError(f"cannot read the configuration {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not isinstance(content.get("cod", {}), dict):
        raise UserError(f"{path} must hold a mapping of flags, with `cod:` a mapping inside it")
    cod = {f"cod.{key}": value for key, value in content.pop("cod", {}).items()}
    return {str(key): value for key, value in content.items()} | cod


class ConfigLoader(yaml.SafeLoader):
    """Safe YAML, where 3e-4 is a number as everywhere else (YAML 1.1 wants 3.0e-4)."""


ConfigLoader.yaml_implicit_resolvers = {
    first: [pair for pair in resolvers if pair[0] != "tag:yaml.org,2002:float"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
ConfigLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*(\.[\d_]*)?([eE][-+]?\d+)?|\.\d+([eE][-+]?\d+)?|\.(inf|nan))$"),
    list("-+0123456789."),
)


@functools.cache
def _known_keys() -> dict[str, argparse.Action]:
    """The keys of a parser that parses nothing: making one takes a tenth of a second."""
    return _keys(build_parser())


def _keys(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """Every accepted key: a flag's name with underscores, and for switches such as --no-bias its destination too."""
    keys: dict[str, argparse.Action] = {}
    for action in parser._actions:
        for option in action.option_strings:
            name = option.lstrip("-").replace("-", "_")
            keys[name.replace("cod_", "cod.", 1) if name.startswith("cod_") else name] = action
    for action in parser._actions:
        if isinstance(action.const, bool):
            keys.setdefault(action.dest, action)
    del keys["config"], keys["help"], keys["h"]
    return keys


def _as_flag(path: Path, key: str, value: Any, action: argparse.Action) -> list[str]:
    flag = action.option_strings[0]
    if isinstance(action.const, bool) and action.nargs == 0:  # a switch
        if not isinstance(value, bool):
            raise UserError(f"{path}: {key} is a switch; true or false is accepted, {value!r} is given")
        named_by_destination = key == action.dest
        wanted = value == action.const if named_by_destination else value
        return [flag] if wanted else []
    if value is None:
        return []
    if action.nargs is None:  # one word, which may begin with a minus
        return [f"{flag}={value}"]
    return [flag, *map(str, value if isinstance(value, list) else [value])]


def explicit_settings(argv: Sequence[str]) -> dict[str, Any]:
    """What `argv` sets, by key and without defaults: a run's resolved configuration, itself a valid one."""
    parser = build_parser()
    parser._defaults.clear()
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    given = vars(parser.parse_args(list(argv)))
    keys = _keys(parser)
    by_destination = {action.dest: (key, action) for key, action in reversed(keys.items())}
    settings = {}
    for destination, value in given.items():
        if destination in by_destination:
            key, action = by_destination[destination]
            switch = action.nargs == 0 and key != destination
            settings[key] = value == action.const if switch else _plain(value)
    return settings


def _plain(value: Any) -> Any:
    """A parsed flag as YAML can hold it."""
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value if isinstance(value, bool | int | float | str) else str(value)
