"""The settings of RunConfig as flags, read from a file, and as the configs of runs."""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hhbench.config import RunConfig, options_of, split_label
from hhbench.errors import UsageError, unknown_name


def add_settings(parser: argparse.ArgumentParser, *, leave_out: Sequence[str] = ()) -> None:
    """A flag for every setting of RunConfig but those to leave out, and --config. None stands for what isn't given."""
    groups: dict[str, Any] = {}
    for field in dataclasses.fields(RunConfig):
        if field.name in leave_out:
            continue
        name = field.metadata["group"]
        if name not in groups:
            groups[name] = parser.add_argument_group(name)
        _add_setting(groups[name], field)
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="settings from a YAML file or a result.json; flags override it"
    )


def _add_setting(group: Any, field: "dataclasses.Field[Any]") -> None:
    flag, meta = f"--{field.name.replace('_', '-')}", field.metadata
    default = f" (default: {field.default})" if field.default not in (None, (), False) else ""
    shared: dict[str, Any] = {"default": None, "help": meta["help"] + default, "dest": field.name}
    if meta["type"] is bool:
        group.add_argument(flag, action="store_true", **shared)
    elif field.name == "option":
        group.add_argument(flag, action="append", metavar="NAME=VALUE", **shared)
    else:
        metavar = "|".join(meta["choices"]) if meta["choices"] else field.name.upper().rpartition("_")[2]
        group.add_argument(flag, metavar=metavar, **shared)


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """The settings of the file that --config names, with those of the command line over them.

    Raises:
        UsageError: a value isn't one of its setting, the file can't be used (see `settings_in`), or it names code
            without --allow-code.
    """
    values = settings_in(args.config) if args.config else {}
    for field in dataclasses.fields(RunConfig):
        given = getattr(args, field.name, None)
        if given is None or given is False:
            continue
        try:
            values[field.name] = options_of(given) if field.name == "option" else field.metadata["type"](given)
        except ValueError as error:
            if isinstance(error, UsageError):
                raise
            raise UsageError(f"--{field.name.replace('_', '-')} can't be {given!r}: {error}") from error
    allow_code = bool(args.allow_code)  # a file can't allow itself
    for name in ("task", "attn"):
        if values.get(name) and getattr(args, name, None) is None:
            _check_named_in_file(name, str(values[name]), allow_code=allow_code)
    if values.get("layers") and getattr(args, "layers", None) is None:
        for _, label in RunConfig.from_dict({"task": "any", "attn": "any", "layers": values["layers"]}).layers:
            _check_named_in_file("attn", split_label(label)[0], allow_code=allow_code)
    return values


def configs_of(args: argparse.Namespace) -> list[RunConfig]:
    """One config for each task and attention that was named, without its data sets.

    Raises:
        UsageError: no task, no attention, or what `settings_of` raises.
    """
    values = settings_of(args)
    for name in ("task", "attn"):
        if not values.get(name):
            raise UsageError(f"--{name} is needed; hhbench list {name.replace('attn', 'attention')}s shows them")
    tasks, attentions = str(values["task"]).split(","), str(values["attn"]).split(",")
    if attentions == ["all"]:
        from hhbench.attention import ATTENTIONS

        attentions = ATTENTIONS.names()
    return [RunConfig.from_dict(values | {"task": t.strip(), "attn": a.strip()}) for t in tasks for a in attentions]


def settings_in(path: Path) -> dict[str, Any]:
    """The settings that a file holds: one `name: value` a line, or a result's. What they name isn't looked up.

    Raises:
        UsageError: it can't be read, it isn't YAML, or it has a setting that isn't one.
    """
    import yaml

    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, RecursionError, yaml.YAMLError) as error:
        raise UsageError(f"--config {path} can't be read: {str(error).splitlines()[0]}") from error
    if not isinstance(values, dict):
        raise UsageError(f"--config {path} must hold settings, one `name: value` a line")
    fields = {field.name: field for field in dataclasses.fields(RunConfig)}
    if "schema" in values and isinstance(values.get("config"), dict):  # a result: the settings that can change it
        settings = values["config"]
        values = {
            name: settings[name] for name in settings if name in fields and fields[name].metadata["changes_result"]
        }
    known = set(fields)
    for name in values:
        if str(name).replace("-", "_") not in known:
            raise unknown_name(f"setting in {path}", str(name), known)
    return {str(name).replace("-", "_"): value for name, value in values.items()}


def _check_named_in_file(kind: str, names: str, *, allow_code: bool) -> None:
    from hhbench.attention import ATTENTIONS
    from hhbench.task import TASKS

    for name in names.split(","):
        if kind == "attn" and name == "all":
            continue
        (ATTENTIONS if kind == "attn" else TASKS).get(name.strip(), allow_code=allow_code)
