"""Recipes and the command line: a YAML recipe overrides the defaults, and flags override both."""

import argparse
import re
import typing
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from ..settings import TrainConfig, all_settings, setting_types, to_setting, without_none
from ..surrogates import unknown_name

_PACKAGE = Path(__file__).parents[1]
# Recipes are in timm_sugar/recipes in a wheel, and in train/recipes in a checkout.
RECIPES = _PACKAGE / "recipes" if (_PACKAGE / "recipes").is_dir() else _PACKAGE.parent / "train" / "recipes"


def load_config(argv: Sequence[str], prog: str, description: str, recipe: str) -> TrainConfig:
    """Read the command line: defaults, then the recipe, then the flags.

    Args:
        argv: Arguments after the program's name.
        prog, description: The program's name and description, for --help.
        recipe: The default recipe.

    Raises:
        ValueError: an unknown recipe, field or flag, with the nearest valid one; a value of the wrong type or range.

    Examples:
        >>> config = load_config(["--epochs", "3"], "train.py", "Trains a network.", recipe="digits")
        >>> config.data, config.epochs
        ('digits', 3)
    """
    parser = argparse.ArgumentParser(
        prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.error = _raise  # type: ignore[method-assign]  # a one-line error instead of the usage text
    parser.add_argument(
        "--recipe", default=recipe, help=f"one of {', '.join(_names())}, or a YAML file (default {recipe})"
    )
    _add_settings(parser)
    parsed, unknown = parser.parse_known_args(argv)
    if unknown:
        flags = [option for action in parser._actions for option in action.option_strings]
        raise ValueError(unknown_name("argument", unknown[0].split("=")[0], flags))

    given = {k: v for k, v in vars(parsed).items() if v is not None and k != "recipe"}
    settings = read_recipe(parsed.recipe)
    for name in ("act_layer", "surrogate"):  # an activation given as a flag replaces the recipe's
        if name in given:
            settings = {k: v for k, v in settings.items() if k not in ("act_layer", "surrogate", "alpha")}
    if "pretrained" in given and "model" not in given and given["pretrained"] not in ("own", "none"):
        settings = {k: v for k, v in settings.items() if k not in ("model", "model_args")}  # a source names the model
    if "model_args" in given:
        given["model_args"] = settings.get("model_args", {}) | _parse_pairs(given["model_args"])
    config = TrainConfig(**settings | given)
    if config.epochs < settings.get("epochs", 0) and "warmup_epochs" in settings and "warmup_epochs" not in given:
        config.warmup_epochs = min(config.warmup_epochs or 0.0, 0.1 * config.epochs)  # at most 10% of a shortened run
    if config.output is None:
        activation = config.act_layer or config.surrogate
        name = re.sub(r"[^\w.-]+", "-", config.model or str(config.pretrained)).strip("-")
        parts = (Path(parsed.recipe).stem, name, *([activation] if activation else []), f"seed{config.seed}")
        config.output = str(Path("output", "-".join(parts)))
    return config


def read_recipe(recipe: str) -> dict[str, Any]:
    """Return the settings of a recipe, by name or path, checked for unknown fields."""
    settings = read_fields(recipe)
    settings.pop("grid", None)
    return settings


def read_fields(recipe: str) -> dict[str, Any]:
    """Return the content of a recipe's YAML file: settings and, for a sweep, its ``grid``."""
    path = Path(recipe) if recipe.endswith((".yaml", ".yml")) else RECIPES / f"{recipe}.yaml"
    if not path.is_file():
        if path.parent != RECIPES:
            raise ValueError(f"recipe file {recipe} does not exist")
        raise ValueError(unknown_name("recipe", recipe, _names()))
    settings = _parse_yaml(path.read_bytes(), f"recipe {path}") or {}
    if not isinstance(settings, dict):
        raise ValueError(f"recipe {path} must be a mapping of settings")
    check_fields(f"recipe {path}", settings, "grid")
    try:
        return {name: value if name == "grid" else to_setting(name, value) for name, value in settings.items()}
    except ValueError as error:
        raise ValueError(f"recipe {path}: {error}") from error


def check_fields(where: str, settings: dict[str, Any], besides: str) -> None:
    """Raise ValueError, with the nearest valid name, if a key is neither a setting nor `besides`."""
    for name in settings:
        if name not in setting_types() and name != besides:
            raise ValueError(f"{where}: " + unknown_name("field", name, list(setting_types())))


def _names() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def _add_settings(parser: argparse.ArgumentParser) -> None:
    """Add a flag for each setting to the argument group of its `Setting.group`."""
    kinds, groups = setting_types(), {}
    for name, known in all_settings().items():
        if known.group not in groups:
            groups[known.group] = parser.add_argument_group(known.group)
        default = getattr(TrainConfig, name, None)  # fields with a default_factory are not class attributes
        shown = "" if default is None else f" (default {default})"
        if known.otherwise is not None:
            shown = f" (default: of the pretrained weights, else {known.otherwise})"
        base = without_none(kinds[name])
        options: dict[str, Any] = dict(default=None, help=known.help.replace("%", "%%") + shown)
        if base is bool:
            options |= dict(action=argparse.BooleanOptionalAction)
        elif typing.get_origin(base) in (list, dict):
            options |= dict(nargs="*", metavar=known.metavar or name[0].upper())
        elif typing.get_origin(base) is Literal:
            options |= dict(metavar="{" + ",".join(typing.get_args(base)) + "}")
        else:
            options |= dict(metavar=known.metavar or base.__name__.upper())
        if known.bare is not None:
            options |= dict(nargs="?", const=known.bare)
        groups[known.group].add_argument("--" + name.replace("_", "-"), **options)


def _parse_pairs(pairs: Sequence[str]) -> dict[str, Any]:
    parsed = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator or not key:
            raise ValueError(f"model_args must be KEY=VALUE pairs, got {pair!r}")
        parsed[key] = _parse_yaml(value, f"model_args {key}")
    return parsed


class _Loader(yaml.SafeLoader):
    """SafeLoader that parses 1e-6 (no decimal point) as a number and rejects duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        names = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = [name for place, name in enumerate(names) if name in names[:place]]
        if twice:
            raise yaml.YAMLError(f"{twice[0]} is given twice")
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), None)


def _parse_yaml(text: str | bytes, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise ValueError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from error


def _raise(message: str) -> typing.NoReturn:
    raise ValueError(message)
