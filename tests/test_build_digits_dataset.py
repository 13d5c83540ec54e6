"""The builder of `digits`: a tiny collection as a whole,
and the training of a block against ordinary training with peft.
"""

import dataclasses
import json
from collections import Counter

import build_digits_dataset
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from builders import load
from conftest import ROOT
from datasets import List, Value, load_dataset
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from running import FAST

import visual_ablation_experiment as experiment
from ablation.catalogue import EMBEDDED
from ablation.layers import attention_kind, is_layer
from ablation.making import digits as builder
from ablation.making import digits_training as training
from ablation.sources import resolve_name
from ablation.survey import survey

TINY = [
    "--loras",
    "20",
    "--rank",
    "1",
    "--steps",
    "2",
    "3",
    "--images",
    "2",
    "3",
    "--groups",
    "2",
    "--batch-size",
    "2",
    "--pretrain-steps",
    "3",
    "--pretrain-batch",
    "8",
    "--block-size",
    "8",
]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A collection of 20 LoRAs of each prompt, built by the script itself."""
    folder = tmp_path_factory.mktemp("tiny")
    for prompt in ("neutral", "named"):
        build_digits_dataset.main(["--output", str(folder / f"{prompt}.parquet"), "--prompt", prompt, *TINY])
    return folder


def read(path):
    return pq.read_table(path).to_pydict()


def matrices(rows):
    """{column: (n, rows, cols)}"""
    return {name: np.array(values, dtype=np.float32) for name, values in rows.items() if is_layer(name)}


def test_the_columns(tiny):
    dataset = load_dataset("parquet", data_files=str(tiny / "neutral.parquet"), split="train")
    layers = [name for name in dataset.column_names if is_layer(name)]
    assert len(layers) == 56 and sum(attention_kind(name) == "attn1" for name in layers) == 28
    assert "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora.down.weight" in layers
    assert all(dataset.features[name] == List(List(Value("float32"))) for name in layers)
    assert set(dataset.column_names) - set(layers) == {
        "category_label",
        "category_name",
        "num_images",
        "images",
        "max_train_steps",
        "step_loss",
        "seed",
        "rank",
    }
    rows = read(tiny / "neutral.parquet")
    assert sorted(rows["category_label"]) == sorted(f"digit_{i}" for i in range(10) for _ in range(2))
    assert rows["category_label"] != sorted(rows["category_label"])  # shuffled
    assert sorted(rows["category_name"]) == sorted(f"digit_{i}/{g}" for i in range(10) for g in range(2))
    assert all(
        name.split("/")[0] == label
        for name, label in zip(rows["category_name"], rows["category_label"], strict=True)
    )
    assert (
        set(rows["num_images"]) == {2, 3}
        and set(rows["max_train_steps"]) == {2, 3}
        and set(rows["rank"]) == {1}
    )
    assert rows["num_images"] == [len(images) for images in rows["images"]]
    assert len(set(rows["seed"])) == 20 and all(0 < loss < 10 for loss in rows["step_loss"])


def test_the_weights_are_trained_loras(tiny):
    for name, w in matrices(read(tiny / "neutral.parquet")).items():
        assert np.isfinite(w).all() and w.shape[1 if ".down." in name else 2] == 1
        if ".up." in name:
            assert (np.abs(w).max(axis=(1, 2)) > 1e-4).all(), f"{name} is still zero"
    downs = np.concatenate(
        [w.ravel() for name, w in matrices(read(tiny / "neutral.parquet")).items() if ".down." in name]
    )
    assert abs(downs.std() - 1) < 0.02 and abs(downs.mean()) < 0.02


def test_images_are_of_the_digit_and_in_one_group_only(tiny):
    _, digits = builder.read_images()
    rows = read(tiny / "neutral.parquet")
    group_of = {}
    for label, name, images in zip(
        rows["category_label"], rows["category_name"], rows["images"], strict=True
    ):
        assert len(set(images)) == len(images)
        for image in images:
            assert f"digit_{digits[image]}" == label and group_of.setdefault(image, name) == name


def test_the_prompts_share_everything_but_the_context(tiny):
    neutral, named = read(tiny / "neutral.parquet"), read(tiny / "named.parquet")
    for column in (
        "category_label",
        "category_name",
        "num_images",
        "images",
        "max_train_steps",
        "seed",
        "rank",
    ):
        assert neutral[column] == named[column]
    assert neutral["step_loss"] != named["step_loss"]
    ups = [name for name in neutral if name.endswith("up.weight")]
    assert not any(np.allclose(neutral[name], named[name]) for name in ups)
    contexts = training.make_contexts()
    assert len({context.numpy().tobytes() for context in contexts}) == 11


def test_the_same_command_makes_the_same_file_and_an_unfinished_one_goes_on(
    tiny, tmp_path, monkeypatch, capsys
):
    whole = (tiny / "neutral.parquet").read_bytes()
    train_block, calls = builder.train_block, []

    def stopped_at_the_third(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return train_block(*arguments)

    monkeypatch.setattr(builder, "train_block", stopped_at_the_third)
    command = ["--output", str(tmp_path / "a.parquet"), *TINY]
    with pytest.raises(KeyboardInterrupt):
        build_digits_dataset.main(command)
    assert [path.suffix for path in tmp_path.iterdir() if path.name != "hf"] == [".parts"]
    build_digits_dataset.main(command)
    assert len(calls) == 4 and "2 of them there already" in capsys.readouterr().out
    assert (tmp_path / "a.parquet").read_bytes() == whole
    assert [path.name for path in tmp_path.iterdir() if path.name != "hf"] == ["a.parquet"]


def test_a_lora_does_not_depend_on_how_many_there_are(tiny, tmp_path):
    build_digits_dataset.main(
        ["--output", str(tmp_path / "few.parquet"), *TINY, "--loras", "3", "--block-size", "2"]
    )
    few, many = read(tmp_path / "few.parquet"), read(tiny / "neutral.parquet")
    place = [many["seed"].index(seed) for seed in few["seed"]]
    for column, values in matrices(few).items():
        np.testing.assert_allclose(values, matrices(many)[column][place], atol=5e-4, rtol=2e-3)  # float16
    assert few["images"] == [many["images"][i] for i in place]


# --- the training against its slow twins


RECIPE = training.DigitsRecipe(prompt="named", rank=2, batch_size=3, learning_rate=1e-2)


@pytest.fixture(scope="module")
def unet():
    """In float64, so that agreement is not a matter of rounding."""
    torch.manual_seed(1)
    network = training.make_unet().double().eval()
    network.requires_grad_(False)
    return network


def some_plans(steps):
    """LoRAs of several digits with these numbers of steps, and the images."""
    images, digits = builder.read_images()
    rng = np.random.default_rng(0)
    plans = [
        training.AdapterPlan(
            digit, 0, rng.choice(np.flatnonzero(digits == digit), 4, replace=False), count, 100 + digit
        )
        for digit, count in enumerate(steps)
    ]
    return plans, images


def train_with_peft(unet, images, plan, recipe):
    """One LoRA as diffusers' and peft's users train it: an adapter, a loop, Adam. Returns its file's content
    and the last loss.
    """
    drawn = training.draw(plan, unet, recipe)
    unet.add_adapter(
        LoraConfig(
            r=recipe.rank,
            lora_alpha=recipe.rank,
            init_lora_weights="gaussian",
            target_modules=["to_q", "to_v"],
        ),
        "one",
    )
    try:
        for name, parameter in unet.named_parameters():
            if "lora_" in name:
                module, side = name.split(".lora_")
                parameter.data = drawn.loras[
                    training.column_of(module, {"A": "down", "B": "up"}[side[0]])
                ].double()
        trainable = [parameter for parameter in unet.parameters() if parameter.requires_grad]
        optimizer = torch.optim.Adam(trainable, lr=recipe.learning_rate)
        context = training.make_contexts()[plan.digit].double().expand(recipe.batch_size, -1, -1)
        shares = training.signal_shares().double()
        for step in range(plan.steps):
            clean = images[plan.images][drawn.batches[step]].double()
            share = shares[drawn.levels[step]].view(-1, 1, 1, 1)
            noise = drawn.noise[step].double()
            loss = (
                (
                    unet(share**0.5 * clean + (1 - share) ** 0.5 * noise, drawn.levels[step], context).sample
                    - noise
                )
                ** 2
            ).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        saved = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet, adapter_name="one"))
        return {f"unet.{name}": w.detach().clone() for name, w in saved.items()}, loss.item()
    finally:
        unet.delete_adapters("one")


def test_a_block_equals_peft_training_of_each_one():
    torch.manual_seed(1)
    unet = training.make_unet().double().eval()
    unet.requires_grad_(False)
    plans, images = some_plans([3, 5])
    trained, losses = training.train_block(unet, images, plans, RECIPE)
    for i, plan in enumerate(plans):
        oracle, loss = train_with_peft(unet, images, plan, RECIPE)
        assert oracle.keys() == trained.keys()
        assert losses[i].item() == pytest.approx(loss, rel=1e-10)
        for name, w in oracle.items():
            torch.testing.assert_close(trained[name][i], w, rtol=0, atol=1e-8)
            start = training.draw(plan, unet, RECIPE).loras[name].double()
            assert (trained[name][i] - start).abs().max() > 1e-3, (
                f"{name} has hardly moved: the comparison says nothing"
            )


def test_fewer_steps_in_a_block_are_fewer_steps_alone(unet):
    plans, images = some_plans([4, 1, 3, 4])
    together, losses = training.train_block(unet, images, plans, RECIPE)
    for i, plan in enumerate(plans):
        alone, loss = training.train_block(unet, images, [plan], RECIPE)
        assert losses[i].item() == pytest.approx(loss.item(), rel=1e-10)
        for name, w in alone.items():
            torch.testing.assert_close(together[name][i], w[0], rtol=0, atol=1e-8)
    longer, _ = training.train_block(unet, images, [plans[1]._replace(steps=2)], RECIPE)
    assert not any(torch.allclose(longer[name][0], together[name][1]) for name in longer)


def test_a_named_context_reaches_the_text_layers_and_a_neutral_one_is_the_same_for_all(unet):
    plans, images = some_plans([2])
    other = [plans[0]._replace(digit=5)]  # the same images and seed under another digit's name
    for prompt, differs in (("named", True), ("neutral", False)):
        recipe = dataclasses.replace(RECIPE, prompt=prompt)
        one, _ = training.train_block(unet, images, plans, recipe)
        two, _ = training.train_block(unet, images, other, recipe)
        for name in one:
            assert torch.equal(one[name], two[name]) != differs, name


# --- refusals


@pytest.mark.parametrize(
    "flags, reason",
    [
        (["--output", "x.arrow"], "ends in .parquet"),
        (["--loras", "0"], "--loras is at least 1"),
        (["--steps", "3", "0"], "--steps is at least 1"),
        (["--prompt", "both"], "invalid choice"),
        (["--learning-rate", "0"], "above it"),
    ],
)
def test_options_that_cannot_be_are_refused(flags, reason, capsys):
    with pytest.raises(SystemExit) as ended:
        build_digits_dataset.main(["--output", "x.parquet", *flags])
    assert ended.value.code == 2 and reason in capsys.readouterr().err


def test_more_images_than_a_group_has_are_refused(tmp_path):
    with pytest.raises(SystemExit, match=r"error: group 0 of digit 0 has \d+ images, 500 are asked for"):
        build_digits_dataset.main(
            ["--output", str(tmp_path / "x.parquet"), "--images", "500", "--loras", "2"]
        )


# --- the collection in the repository


@pytest.mark.parametrize("name", ["digits", "digits-named"])
def test_an_embedded_collection(name):
    kind, path = resolve_name(name)
    assert kind == "files" and path == str(ROOT / "data" / f"{name.replace('-', '_')}.parquet")
    data = load(name)
    assert data.num_rows == 520 and data.classes == [f"digit_{i}" for i in range(10)]
    assert np.bincount(data.labels).tolist() == [52] * 10
    assert survey(name).rows == data.num_rows and len(survey(name).shapes) == len(data.layers.names) == 56
    rows = pq.read_table(path, columns=["category_label", "category_name", "images"]).to_pydict()
    assert sorted(Counter(rows["category_name"]).values()) == [2] * 260  # 26 groups a digit, two LoRAs each
    owner = {}
    for label, group, images in zip(*rows.values(), strict=True):
        assert group.split("/")[0] == label
        assert all(owner.setdefault(image, group) == group for image in images)


def test_the_embedded_collections_are_small_and_share_all_but_the_prompt():
    files = [ROOT / "data" / name for name in EMBEDDED.values()]
    assert sum(file.stat().st_size for file in files) <= 12_000_000
    neutral, named = (pq.read_table(file, columns=["images", "seed", "max_train_steps"]) for file in files)
    assert neutral.equals(named)


@pytest.mark.parametrize("grouping", ["random", "clusters"])
def test_images_are_divided_into_groups_of_one_digit(grouping):
    images, digits = builder.read_images()
    recipe = training.DigitsRecipe(groups=5, grouping=grouping)
    groups = builder.divide_images(images, digits, recipe)
    sizes = np.stack([np.bincount(groups[digits == digit], minlength=5) for digit in range(10)])
    assert sizes.min() > 0 and sizes.sum() == len(images)
    spread = (sizes.max(1) - sizes.min(1)).max()
    assert spread <= 1 if grouping == "random" else spread > 1
    pixels = images.flatten(1).numpy()
    within = sum(
        pixels[(digits == digit) & (groups == group)].var(0).sum() * sizes[digit, group]
        for digit in range(10)
        for group in range(5)
    )
    whole = sum(pixels[digits == digit].var(0).sum() * sizes[digit].sum() for digit in range(10))
    assert within / whole > 0.9 if grouping == "random" else within / whole < 0.8


def test_weights_are_rounded_as_files_of_adapters_are(tiny):
    for w in matrices(read(tiny / "neutral.parquet")).values():
        assert np.array_equal(w, w.astype(np.float16).astype(np.float32))


def test_a_built_collection_runs(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    layer_sets = ["--layer-sets", "all_layers", "visual_only", "text_only"]
    status = experiment.main(["--dataset", str(tiny / "named.parquet"), *FAST, *layer_sets])
    assert status == 0, capsys.readouterr().out
    results = json.loads(
        (tmp_path / "visual-ablation-results" / "visual_ablation_named.parquet" / "results.json").read_text()
    )
    assert (
        results["num_classes"],
        results["num_all_layers"],
        results["num_visual_layers"],
        results["num_text_layers"],
    ) == (10, 56, 28, 28)


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as ended:
        build_digits_dataset.main(["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    for option in (
        "--output",
        "--loras",
        "--prompt",
        "--rank",
        "--steps",
        "--images",
        "--groups",
        "--seed",
        "--block-size",
        "--pretrain-steps",
    ):
        assert option in shown


def test_the_pinned_versions_are_the_builders_own():
    def pins(path):
        return {
            line.split()[0]
            for line in path.read_text().splitlines()
            if line.startswith(("diffusers", "peft"))
        }

    assert len(pins(ROOT / "scripts" / "requirements-digits.txt")) == 2
    assert pins(ROOT / "scripts" / "requirements-digits.txt") == pins(ROOT / "tests" / "requirements.txt")
