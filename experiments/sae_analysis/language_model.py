"""A language model and the SAEs of its layers: texts -> tokens -> residual vectors -> features.

TransformerLens's bridge runs the model of transformers as it is: no weight is folded or centred, because
Gemma Scope was trained on raw activations.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from checkpointing import file_stamps

from . import AnalysisError, InputError
from .settings import TINY, Settings, resolve_device

WAYS_OUT = (
    "log in to the Hub (hf auth login; Gemma's licence must be accepted there), give a local folder "
    f"to --model, or try --model {TINY}"
)


class Reader:
    """Reads texts with a language model, and encodes what its layers hold.

    `layers` ascending; `saes` one for each; `width` of the residual stream. SAEs compute in float64, so that
    rounding does not decide which features are active; Apple's GPUs have none, so there they run on the CPU.
    """

    def __init__(self, model: Any, tokenizer: Any, saes: list[Any], settings: Settings, device: str):
        self.model, self.tokenizer, self.saes = model, tokenizer, saes
        self.layers, self.device, self.sae_device = settings.layers, device, sae_device(device)
        self.width: int = model.cfg.d_model
        self.autocast = settings.dtype
        for layer, sae in zip(self.layers, saes, strict=True):
            if layer >= model.cfg.n_layers:
                raise InputError(
                    f"--layers {layer}: {settings.model} has layers 0 to {model.cfg.n_layers - 1}"
                )
            check_sae(sae, layer, self.width, settings)
        if saes[1].cfg.d_sae != saes[2].cfg.d_sae:
            raise InputError(
                "the SAEs of the second and third layer have unequal numbers of features: use others"
            )

    def tokenise(self, text: str) -> list[int]:
        """The tokens of a text after one BOS token."""
        return tokenise(self.tokenizer, text)

    @torch.no_grad()
    def residuals(self, tokens: list[list[int]], count: int | None = None) -> list[Tensor]:
        """The residual stream after the first `count` of `layers` at the last token of B texts.

        The texts must have equal lengths: none is padded.
        Returns float32 tensors (B, width), a layer each. One forward pass, which ends after the last layer
        that is needed. Raises AnalysisError if a number is not finite.
        """
        layers = self.layers[:count]
        found: dict[int, Tensor] = {}

        def keep(layer: int):
            def hook(value: Tensor, hook: Any) -> None:
                found[layer] = value[:, -1].float()

            return hook

        inputs = torch.tensor(tokens, device=self.device)
        with self.precision():
            self.model.run_with_hooks(
                inputs,
                return_type=None,
                stop_at_layer=layers[-1] + 1,
                fwd_hooks=[(f"blocks.{layer}.hook_resid_post", keep(layer)) for layer in layers],
            )
        for layer in layers:
            if not found[layer].isfinite().all():
                raise AnalysisError(
                    f"the residual stream of layer {layer} is not finite: use --dtype float32 or bfloat16"
                )
        return [found[layer] for layer in layers]

    def precision(self) -> contextlib.AbstractContextManager:
        """The context of a forward pass in the precision asked for."""
        if self.autocast == "float32":
            return contextlib.nullcontext()
        return torch.autocast(torch.device(self.device).type, getattr(torch, self.autocast))

    @torch.no_grad()
    def features(self, position: int, x: Tensor) -> Tensor:
        """(B, F) float64 features of the SAE at a position of `layers` for residual vectors (B, width)."""
        f = self.saes[position].encode(x.to(self.sae_device))
        if f.numel() and f.amin() < 0:
            raise InputError(
                f"the SAE of layer {self.layers[position]} has features below 0: use another release"
            )
        return f

    @torch.no_grad()
    def reconstruction(self, position: int, f: Tensor) -> Tensor:
        """(B, width) float64: what an SAE makes of features (B, F)."""
        return self.saes[position].decode(f)

    def decoder(self, position: int) -> Tensor:
        """(F, width) float64: the decoder rows of an SAE."""
        return self.saes[position].W_dec


def sae_device(device: str) -> str:
    """Where the SAEs of a model on `device` run."""
    return "cpu" if device == "mps" else device


def check_sae(sae: Any, layer: int, width: int, settings: Settings) -> None:
    """Raise InputError if an SAE was not trained for this place."""
    if sae.cfg.d_in != width:
        raise InputError(
            f"the SAE of layer {layer} reads vectors of {sae.cfg.d_in} numbers, the residual stream of "
            f"{settings.model} has {width}: give the --sae-release that belongs to the model"
        )
    hook = sae.cfg.metadata.get("hook_name")
    if hook and hook != f"blocks.{layer}.hook_resid_post":
        raise InputError(
            f"the SAE of layer {layer} was trained on {hook}, not on blocks.{layer}.hook_resid_post: give "
            "another --sae-release or other --layers"
        )


def is_out_of_memory(error: RuntimeError) -> bool:
    """True if memory ran out on a CUDA GPU, on an Apple GPU, or on the host."""
    words = ("MPS backend out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)


def load(settings: Settings, toy: Path | None, device: str | None = None) -> Reader:
    """The model and its SAEs on a device; `toy` is the folder of the toy, if it is asked for.

    Raises InputError, which names the ways out, and AnalysisError if memory does not hold them.
    """
    device = resolve_device(device or settings.device)
    source = str(toy) if toy else settings.model
    tokenizer = load_tokenizer(settings, toy)
    release = str(toy) if toy else settings.sae_release
    try:
        model = load_model(source, tokenizer, settings, device)
        saes = [load_sae(release, settings, layer, sae_device(device)) for layer in settings.layers]
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise AnalysisError(
            f"the model does not fit into the memory of {device}: use --load-in-8bit or another --device"
        ) from None
    return Reader(model, tokenizer, saes, settings, device)


def describe(settings: Settings, toy: Path | None) -> dict[str, Any]:
    """What the model and the SAEs are, for the manifest: names, the Hub's commit, stamps of local files.

    Raises InputError for what cannot be found.
    """
    import transformers

    if toy:
        return {"model": TINY, "files": stamps_of(str(toy))}
    for layer in settings.layers:
        sae_folder(settings.sae_release, settings, layer)
    try:
        config = Path(transformers.utils.cached_file(settings.model, "config.json"))
    except (OSError, ValueError) as error:
        raise not_loaded(settings, error) from None
    return {
        "model": settings.model,
        "commit": config.parent.name if config.parent.parent.name == "snapshots" else None,
        "saes": f"{settings.sae_release}, width {settings.sae_width}",
        "files": stamps_of(settings.model) + stamps_of(settings.sae_release),
    }


def load_tokenizer(settings: Settings, toy: Path | None) -> Any:
    """The model's tokenizer alone. Raises InputError."""
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(str(toy or settings.model))
    except (OSError, ValueError, ImportError) as error:
        raise not_loaded(settings, error) from None


def tokenise(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text after one BOS token. Raises InputError if the tokenizer has none."""
    if tokenizer.bos_token_id is None:
        raise InputError("the model's tokenizer has no BOS token: use another model")
    return [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]


def not_loaded(settings: Settings, error: Exception) -> InputError:
    """The refusal of a model that cannot be loaded."""
    reason = " ".join(str(error).split())[:200]
    return InputError(f"cannot load the model {settings.model} ({reason}): {WAYS_OUT}")


def load_model(source: str, tokenizer: Any, settings: Settings, device: str) -> Any:
    """A bridge of TransformerLens over a model of transformers. Raises InputError."""
    import transformers
    from transformer_lens.model_bridge import TransformerBridge

    transformers.utils.logging.disable_progress_bar()
    options: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager"}
    if settings.load_in_8bit:
        options |= {
            "quantization_config": transformers.BitsAndBytesConfig(load_in_8bit=True),
            "device_map": {"": device},
        }
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(source, **options)
    except (OSError, ValueError, ImportError) as error:
        raise not_loaded(settings, error) from None
    if not settings.load_in_8bit:
        model = model.to(device)
    return TransformerBridge.boot_transformers(
        source, hf_model=model.eval(), tokenizer=tokenizer, device=device
    )


def load_sae(release: str, settings: Settings, layer: int, device: str) -> Any:
    """The SAE of a layer in float64: of a folder, or of a release that SAELens knows. Raises InputError."""
    from sae_lens import SAE

    folder = sae_folder(release, settings, layer)
    try:
        if folder:
            return SAE.load_from_disk(folder, device=device, dtype="float64").eval()
        return SAE.from_pretrained(release, sae_name(settings, layer), device=device, dtype="float64").eval()
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"cannot load the SAE {sae_name(settings, layer)} of {release} ({reason}): log in to the Hub "
            f"(hf auth login), give a folder to --sae-release, or try --model {TINY}"
        ) from None


def sae_name(settings: Settings, layer: int) -> str:
    """The name of a layer's SAE in a release like Gemma Scope's."""
    return f"layer_{layer}/width_{settings.sae_width}/canonical"


def sae_folder(release: str, settings: Settings, layer: int) -> Path | None:
    """The local folder of a layer's SAE; None for a release that SAELens knows. Raises InputError."""
    if Path(release).is_dir():
        folders = [Path(release) / sae_name(settings, layer), Path(release) / f"layer_{layer}"]
        for folder in folders:
            if (folder / "cfg.json").is_file():
                return folder
        raise InputError(
            f"no SAE of layer {layer} in {release}: save one to {folders[1]} with SAELens's save_model"
        )
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    known = get_pretrained_saes_directory()
    if release not in known and "/" not in release:
        raise InputError(f"unknown SAE release '{release}': give one that SAELens lists, or a folder")
    if release in known and sae_name(settings, layer) not in known[release].saes_map:
        raise InputError(
            f"{release} has no {sae_name(settings, layer)}: give another --sae-width or --layers"
        )
    return None


def stamps_of(source: str) -> list:
    """Sizes and times of a folder's files; nothing for a name on the Hub."""
    folder = Path(source)
    return file_stamps(sorted(map(str, filter(Path.is_file, folder.rglob("*"))))) if folder.is_dir() else []
