"""The command line of both versions, and what it must agree on."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

from . import EXPERIMENTS, InputError
from .samples import FILES

TINY = "tiny"
# The default of --layers for the toy, which has four layers.
TOY_LAYERS = (1, 2, 3)
DTYPES = ("float32", "bfloat16", "float16")
# Settings that change rounding at most: a run may be resumed with others.
FREE = ("batch_size", "device", "devices", "ray", "output_dir", "resume")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What an analysis does."""

    data_dir: str
    domains: tuple[str, ...]
    max_samples: int  # 0: all
    model: str  # a name on the Hub, a folder, or TINY
    sae_release: str  # of SAELens, or a folder; empty for the toy, which has its own
    sae_width: str  # empty for the toy
    layers: tuple[int, ...]  # ascending, three or more
    seed: int  # of the noise
    noise_draws: int
    dtype: str  # of the forward pass; SAEs and measures are float64
    load_in_8bit: bool
    device: str
    output_dir: str
    resume: str
    batch_size: int = 1  # samples
    devices: tuple[str, ...] = ()
    ray: str = ""

    def result_settings(self) -> dict[str, Any]:
        """The settings that numbers depend on, as JSON values."""
        every = dataclasses.asdict(self)
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in every.items()
            if name not in FREE
        }


def parser_of(description: str, batched: bool) -> argparse.ArgumentParser:
    """The parser of the sequential version, or of the batched one."""
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,  # --resume is looked for before the rest is read
    )
    add = parser.add_argument
    add(
        "--data-dir",
        default=str(EXPERIMENTS / "data"),
        help="folder of the files " + ", ".join(FILES.values()),
    )
    add("--domains", nargs="+", default=list(FILES), choices=list(FILES), help="files to read")
    add("--max-samples", type=whole(0), default=0, help="at most so many, spread over the domains; 0: all")
    add(
        "--model", default="google/gemma-2-2b", help=f"name on the Hub, folder, or '{TINY}': a toy, made here"
    )
    add(
        "--sae-release",
        default="gemma-scope-2b-pt-res-canonical",
        help="release that SAELens knows, or a folder with layer_<L>/[width_<W>/canonical/] of SAELens",
    )
    add("--sae-width", default="16k", help="width in the names of the SAEs")
    add("--layers", nargs="+", type=whole(0), default=[5, 12, 20], help="three or more, ascending")
    add("--seed", type=int, default=42, help="of the noise, together with a sample's id")
    add("--noise-draws", type=whole(1), default=1, help="draws of noise that stability is averaged over")
    add("--dtype", choices=DTYPES, default="float32", help="of the model's forward pass (autocast)")
    add("--load-in-8bit", action="store_true", help="the model in 8 bits; needs bitsandbytes")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:<number> or mps")
    runs = EXPERIMENTS / "06_comprehensive_analysis" / "runs"
    add("--output-dir", default=str(runs), help="a run gets a folder YYYYMMDD_HHMMSS in it")
    add(
        "--resume",
        default="",
        metavar="RUN",
        help="folder of a run that was stopped; its settings are taken, but not its devices",
    )
    if batched:
        add("--batch-size", type=whole(1), default=8, help="samples; three texts each")
        add("--devices", nargs="+", default=[], help="several devices, a process each: cuda:0 cuda:1")
        add("--ray", default="", metavar="ADDRESS", help="spread over Ray: 'local', or a cluster's address")
    return parser


def whole(least: int):
    """A type of argparse: whole numbers from `least`."""

    def number(text: str) -> int:
        if not text.isascii() or not text.isdecimal() or not least <= int(text) < 2**31:
            raise argparse.ArgumentTypeError(f"'{text}' is no whole number of at least {least}")
        return int(text)

    return number


def parse_settings(parser: argparse.ArgumentParser, argv: list[str] | None, manifest: dict) -> Settings:
    """The command line over the settings in the manifest of a resumed run ({}: a new run). Raises InputError.

    The batch size is taken too: with another one a CPU's last digits differ.
    """
    made_with = manifest.get("settings", {})
    parser.set_defaults(**made_with)
    if manifest:
        parser.set_defaults(batch_size=manifest["free_settings"]["batch_size"])
    values = vars(parser.parse_args(argv))
    typed = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(values, ...))))
    if values["model"] == TINY and not made_with:
        if typed["sae_release"] is not ... or typed["sae_width"] is not ...:
            raise InputError("--sae-release and --sae-width: the toy has its own SAEs; leave them out")
        values |= {"sae_release": "", "sae_width": ""}
        if typed["layers"] is ...:
            values["layers"] = TOY_LAYERS
    arguments: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    settings = Settings(**arguments)
    check(settings)
    differing = [
        name for name, value in settings.result_settings().items() if made_with.get(name, value) != value
    ]
    if differing:
        flag = "--" + differing[0].replace("_", "-")
        raise InputError(
            f"{flag} differs from the run's ({made_with[differing[0]]}): leave it out, or start another run"
        )
    return settings


def check(settings: Settings) -> None:
    """Raise InputError for settings that do not go together."""
    layers = settings.layers
    if len(layers) < 3 or list(layers) != sorted(set(layers)):
        raise InputError(f"--layers {' '.join(map(str, layers))}: give three or more, ascending")
    if not settings.output_dir:
        raise InputError("--output-dir is empty: give a folder")
    if len(set(settings.domains)) < len(settings.domains):
        raise InputError("--domains: a domain is named twice")
    if settings.load_in_8bit and importlib.util.find_spec("bitsandbytes") is None:
        raise InputError("--load-in-8bit needs bitsandbytes: pip install bitsandbytes, or leave the flag out")
    if settings.load_in_8bit and settings.model == TINY:
        raise InputError("--load-in-8bit is not for the toy: leave the flag out")
    if settings.ray and importlib.util.find_spec("ray") is None:
        raise InputError("--ray needs ray: pip install -r experiments/requirements-ray.txt")
    for device in (settings.device, *(() if settings.ray else settings.devices)):
        resolve_device(device)


def resolve_device(name: str) -> str:
    """A device that this machine has, as torch names it. Raises InputError."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind, _, number = name.partition(":")
    count = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if kind not in count or (number and not number.isdecimal()) or (":" in name and kind != "cuda"):
        raise InputError(f"unknown device '{name}': use auto, cpu, cuda, cuda:<number> or mps")
    if int(number or 0) >= count[kind]:
        raise InputError(f"device '{name}' is not on this machine (it has {count[kind]} of {kind}): use auto")
    return name


def resumed_folder(argv: list[str] | None) -> Path | None:
    """The folder that --resume names, before anything else is read."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--resume")
    named = parser.parse_known_args(argv)[0].resume
    if named == "":
        raise InputError("--resume is empty: give the folder of a run")
    return Path(named) if named else None
