"""Tiny models of diffusers with an input each, to see which tokens pass a module.

The image has 16 tokens and the text 7; Z-Image pads them to 32 and 64.
"""

import diffusers
import torch

IMAGE, TEXT = 16, 7
ZEROS, ONE = torch.zeros, torch.ones(1)
SEEN = torch.ones(1, TEXT, dtype=torch.bool)


def flux():
    model = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )
    return model, {
        "hidden_states": ZEROS(1, IMAGE, 4),
        "encoder_hidden_states": ZEROS(1, TEXT, 32),
        "pooled_projections": ZEROS(1, 32),
        "timestep": ONE,
        "guidance": ONE,
        "img_ids": ZEROS(IMAGE, 3),
        "txt_ids": ZEROS(TEXT, 3),
    }


def sd3():
    model = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=64,
        out_channels=4,
        dual_attention_layers=(0,),
        pos_embed_max_size=8,
    )
    return model, {
        "hidden_states": ZEROS(1, 4, 8, 8),
        "encoder_hidden_states": ZEROS(1, TEXT, 32),
        "pooled_projections": ZEROS(1, 64),
        "timestep": ONE,
    }


def hunyuan_video():
    model = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=1,
        guidance_embeds=True,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
    )
    return model, {
        "hidden_states": ZEROS(1, 4, 1, 4, 4),
        "encoder_hidden_states": ZEROS(1, TEXT, 16),
        "encoder_attention_mask": torch.ones(1, TEXT),
        "pooled_projections": ZEROS(1, 8),
        "timestep": ONE,
        "guidance": ONE,
    }


def qwen_image():
    model = diffusers.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )
    return model, {
        "hidden_states": ZEROS(1, IMAGE, 16),
        "encoder_hidden_states": ZEROS(1, TEXT, 16),
        "encoder_hidden_states_mask": torch.ones(1, TEXT),
        "timestep": ONE,
        "img_shapes": [[(1, 4, 4)]],
    }


def mochi():
    model = diffusers.MochiTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=4,
        text_embed_dim=16,
        time_embed_dim=4,
        max_sequence_length=TEXT,
    )
    return model, {
        "hidden_states": ZEROS(1, 4, 1, 8, 8),
        "encoder_hidden_states": ZEROS(1, TEXT, 16),
        "timestep": ONE,
        "encoder_attention_mask": SEEN,
    }


def wan():
    model = diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        ffn_dim=32,
        num_layers=1,
        rope_max_seq_len=32,
    )
    return model, {
        "hidden_states": ZEROS(1, 4, 1, 8, 8),
        "encoder_hidden_states": ZEROS(1, TEXT, 16),
        "timestep": ONE.long(),
    }


def ltx():
    model = diffusers.LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=32,
        num_layers=1,
        caption_channels=16,
    )
    return model, {
        "hidden_states": ZEROS(1, IMAGE, 4),
        "encoder_hidden_states": ZEROS(1, TEXT, 16),
        "timestep": ONE.long(),
        "encoder_attention_mask": SEEN,
        "num_frames": 1,
        "height": 4,
        "width": 4,
    }


def pixart():
    model = diffusers.PixArtTransformer2DModel(
        sample_size=8,
        num_layers=1,
        attention_head_dim=2,
        num_attention_heads=2,
        cross_attention_dim=4,
        caption_channels=8,
        use_additional_conditions=False,
        norm_num_groups=1,
    )
    return model, {
        "hidden_states": ZEROS(1, 4, 8, 8),
        "encoder_hidden_states": ZEROS(1, TEXT, 8),
        "timestep": ONE.long(),
        "added_cond_kwargs": {"aspect_ratio": None, "resolution": None},
    }


def sana():
    model = diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=4,
        num_attention_heads=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=8,
        sample_size=4,
    )
    return model, {
        "hidden_states": ZEROS(1, 4, 4, 4),
        "encoder_hidden_states": ZEROS(1, TEXT, 8),
        "timestep": ONE,
    }


def lumina():
    model = diffusers.LuminaNextDiT2DModel(
        sample_size=8,
        hidden_size=24,
        num_layers=1,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=16,
        cross_attention_dim=32,
    )
    return model, {
        "hidden_states": ZEROS(1, 4, 8, 8),
        "encoder_hidden_states": ZEROS(1, TEXT, 32),
        "timestep": ONE,
        "encoder_mask": torch.ones(1, TEXT),
        "image_rotary_emb": torch.ones(4, 4, 4, dtype=torch.complex64),
        "cross_attention_kwargs": {},
    }


def lumina2():
    model = diffusers.Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=24,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=2,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(128, 128, 128),
        cap_feat_dim=8,
    )
    return model, {
        "hidden_states": ZEROS(1, 4, 8, 8),
        "encoder_hidden_states": ZEROS(1, TEXT, 8),
        "timestep": ONE,
        "encoder_attention_mask": SEEN,
    }


def z_image():
    model = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    return model, {"x": [ZEROS(4, 1, 8, 8)], "t": ONE, "cap_feats": [ZEROS(40, 16)]}


def cogvideox():
    model = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=8,
        num_layers=1,
        sample_width=8,
        sample_height=8,
        sample_frames=1,
        max_text_seq_length=TEXT,
    )
    return model, {
        "hidden_states": ZEROS(1, 1, 4, 8, 8),
        "encoder_hidden_states": ZEROS(1, TEXT, 8),
        "timestep": ONE.long(),
    }


def krea2():
    model = diffusers.Krea2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        timestep_embed_dim=8,
        text_hidden_dim=16,
        num_text_layers=3,
        text_num_attention_heads=2,
        text_num_key_value_heads=1,
        text_intermediate_size=32,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(8, 4, 4),
    )
    return model, {
        "hidden_states": ZEROS(1, IMAGE, 16),
        "encoder_hidden_states": ZEROS(1, TEXT, 3, 16),
        "timestep": ONE,
        "position_ids": ZEROS(TEXT + IMAGE, 3),
    }


# By the name of the architecture.
TINY = {
    function.__name__.replace("_", "-"): function
    for function in (
        flux,
        sd3,
        hunyuan_video,
        qwen_image,
        mochi,
        wan,
        ltx,
        pixart,
        sana,
        lumina,
        lumina2,
        z_image,
        cogvideox,
        krea2,
    )
}
TOKENS = {"z-image": (32, 64)}  # where they are not IMAGE and TEXT
WEIGHTED = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)


def tokens_seen(name):
    """{module: tokens of its input} of every Linear of a tiny model, when the model runs once."""
    model, inputs = TINY[name]()
    seen = {}
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(
                lambda module, given, path=path: (
                    seen.__setitem__(path, given[0].shape[-2]) if given[0].ndim > 1 else None
                )
            )
    with torch.no_grad():
        model(**inputs)
    return seen


# Further settings of these models, which have modules that the tiny ones lack.
VARIANTS = {
    "wan": [
        ("WanTransformer3DModel", {"num_layers": 1, "image_dim": 8, "added_kv_proj_dim": 16}),
        ("WanVACETransformer3DModel", {"num_layers": 1, "vace_layers": [0]}),
    ],
    "pixart": [("PixArtTransformer2DModel", {"num_layers": 1, "caption_channels": 16})],
    "z-image": [("ZImageTransformer2DModel", {"n_layers": 1, "n_refiner_layers": 1, "siglip_feat_dim": 8})],
    "qwen-image-2.1": [("QwenImage21Transformer2DModel", {"num_layers": 1})],
}


def modules_of(name):
    """Paths of every module with weights in the models of an architecture."""
    made = [TINY[name]()[0]] if name in TINY else []
    with torch.device("meta"):
        made += [getattr(diffusers, kind)(**settings) for kind, settings in VARIANTS.get(name, [])]
    return {path for model in made for path, module in model.named_modules() if isinstance(module, WEIGHTED)}
