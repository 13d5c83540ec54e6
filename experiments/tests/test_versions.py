"""Both versions against each other, against transformers, and without the faults of the public original."""

import dataclasses

import polars as pl
import pytest
import torch
import transformers
from conftest import DATA, LAYERS, script
from sae_analysis import AnalysisError, batches, language_model
from sae_analysis.batches import Measurer, plan, rows_of
from sae_analysis.language_model import load
from sae_analysis.noise import noise_of
from sae_analysis.progress import Clock
from sae_analysis.rows import columns
from sae_analysis.samples import read_samples, spread

SAMPLES = spread(read_samples(DATA), 48)
sequential = script("06_comprehensive_analysis.py")


@pytest.fixture(scope="session")
def one_by_one(reader):
    """Rows of the reference by sample id."""
    rows = {}
    for sample in SAMPLES:
        z = noise_of(42, sample.id, 2, reader.width)
        rows[sample.id] = sequential.measure_sample(reader, sample, z, Clock())
    return rows


def batched(reader, batch_size, samples=SAMPLES, measurer=None):
    """Rows of the batched version by sample id."""
    measurer = measurer or Measurer(reader, 42, 2)
    found = ((batch, measurer.measure(batch)) for batch in plan(samples, reader.tokenise, batch_size))
    return {row["sample_id"]: row for rows in rows_of(samples, reader.layers, found) for row in rows}


def assert_equal(found, expected, rel=1e-6):
    assert found.keys() == expected.keys()
    for sample_id, row in expected.items():
        assert set(row) == set(columns(LAYERS)) == set(found[sample_id])
        for name, value in row.items():
            if isinstance(value, float):
                assert found[sample_id][name] == pytest.approx(value, rel=rel, abs=1e-9), (sample_id, name)
            else:
                assert found[sample_id][name] == value, (sample_id, name)


@pytest.mark.parametrize("batch_size", [1, 3, 8, 200])
def test_the_batched_version_gives_the_numbers_of_the_sequential_one(reader, one_by_one, batch_size):
    rows = batched(reader, batch_size)
    assert_equal(rows, one_by_one)
    assert len({row["l1_fact_l0_norm"] for row in rows.values()}) > 5  # texts differ


def test_neither_order_nor_neighbours_change_a_number(reader, one_by_one):
    chosen = SAMPLES[30:5:-3]
    assert_equal(batched(reader, 8, chosen), {s.id: one_by_one[s.id] for s in chosen})


# --- the language model


def hidden_states(toy, reader, text):
    """The residual stream of one text after LAYERS at its last token, by transformers alone."""
    model = transformers.AutoModelForCausalLM.from_pretrained(toy, attn_implementation="eager")
    found = []
    for layer in LAYERS:
        model.model.layers[layer].register_forward_hook(
            lambda m, i, o: found.append(o[0] if isinstance(o, tuple) else o)
        )
    with torch.no_grad():
        model(input_ids=torch.tensor([reader.tokenise(text)]))
    return [x.reshape(-1, x.shape[-1])[-1] for x in found]


def test_fault_1_the_last_real_token_is_read_whatever_the_lengths(toy, reader):
    texts = [text for sample in SAMPLES[:6] for text in sample.texts]
    assert len({len(reader.tokenise(text)) for text in texts}) > 3
    (batch,) = [
        b
        for b in plan(SAMPLES, reader.tokenise, 200)
        if SAMPLES[0].id in {t.sample_id for t in b if t.position == 1}
    ]
    together = reader.residuals([text.tokens for text in batch])
    for number, text in enumerate(batch[:4]):
        expected = hidden_states(toy, reader, SAMPLES[text.sample].texts[text.position])
        for x, y in zip(together, expected, strict=True):
            torch.testing.assert_close(x[number], y, rtol=1e-5, atol=1e-5)
    short, long = sorted((reader.tokenise(text) for text in texts), key=len)[:: len(texts) - 1]
    padded = reader.residuals([short + [0] * (len(long) - len(short)), long])[0][0]
    assert (
        padded - reader.residuals([short])[0][0]
    ).norm() > 0.1 * padded.norm()  # what the original measured


def test_texts_read_together_have_one_length_and_bos_once(reader):
    for batch in plan(SAMPLES, reader.tokenise, 8):
        assert len({len(text.tokens) for text in batch}) == 1 and len(batch) <= 24
        assert len({text.position == 0 for text in batch}) == 1
        for text in batch:
            assert text.tokens.count(reader.tokenizer.bos_token_id) == 1
            assert text.tokens[0] == reader.tokenizer.bos_token_id
    count = sum(len(batch) for batch in plan(SAMPLES, reader.tokenise, 8))
    assert count == 3 * len(SAMPLES)


def test_fault_2_one_forward_pass_a_batch_that_ends_after_the_last_layer_needed(reader):
    passes = dict.fromkeys(range(4), 0)

    def count(layer):
        def hook(*_):
            passes[layer] += 1

        return hook

    blocks = reader.model.blocks
    hooks = [blocks[layer].register_forward_hook(count(layer)) for layer in passes]
    try:
        reader.residuals([[1, 5, 6]], 1)
        assert passes == {0: 1, 1: 1, 2: 0, 3: 0}
        assert len(reader.residuals([[1, 5, 6]])) == 3
        assert passes == {0: 2, 1: 2, 2: 1, 3: 1}
    finally:
        for hook in hooks:
            hook.remove()


def test_fault_3_the_axis_is_a_direction_of_the_residual_stream(reader):
    batch = plan(SAMPLES, reader.tokenise, 8)[-1]
    for measured in Measurer(reader, 42, 1).measure(batch):
        assert measured.axis.shape == measured.centroid.shape == (reader.width,)
        assert float(measured.axis.norm()) == pytest.approx(1)


def test_fault_4_the_noise_is_that_of_the_seed_and_the_sample(reader):
    z = noise_of(42, "entity_001", 2000, 64)
    assert torch.equal(z[:3], noise_of(42, "entity_001", 3, 64))
    assert not torch.equal(z[0], noise_of(43, "entity_001", 1, 64)[0])
    assert not torch.equal(z[0], noise_of(42, "entity_002", 1, 64)[0])
    assert abs(float(z.mean())) < 0.01 and float(z.std()) == pytest.approx(1, abs=0.01)
    sample = SAMPLES[0]._replace(hallucination=SAMPLES[0].fact)
    (row,) = batched(reader, 8, [sample]).values()
    assert row["stability_fact"] == row["stability_hall"]  # one noise for both completions
    assert row["centroid_drift_diff"] == row["axis_twist_diff"] == 0


def test_fault_5_a_batch_that_fails_ends_the_run(run, monkeypatch, tmp_path):
    def broken(self, batch):
        raise ValueError("broken")

    monkeypatch.setattr(Measurer, "measure_at_once", broken)
    with pytest.raises(ValueError, match="broken"):
        run("06_comprehensive_analysis_parallel.py", "--max-samples", "4")
    assert not list(tmp_path.rglob("metrics.parquet"))


def test_fault_5_a_batch_too_large_for_memory_is_halved_and_it_is_said(
    reader, one_by_one, monkeypatch, caplog
):
    plain, sizes = Measurer.measure_at_once, []

    def small_memory(self, batch):
        if len(batch) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        sizes.append(len(batch))
        return plain(self, batch)

    monkeypatch.setattr(Measurer, "measure_at_once", small_memory)
    monkeypatch.setattr(batches.log, "propagate", True)
    assert_equal(batched(reader, 8), one_by_one)
    assert max(sizes) <= 5 and "Out of memory" in caplog.text
    monkeypatch.setattr(
        Measurer,
        "measure_at_once",
        lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory")),
    )
    with pytest.raises(AnalysisError, match="one text alone does not fit"):
        batched(reader, 8)


def test_fault_7_no_weight_is_folded_or_centred(toy, settings, reader, tmp_path):
    text = SAMPLES[0].texts[1]
    expected = hidden_states(toy, reader, text)
    for x, y in zip(reader.residuals([reader.tokenise(text)]), expected, strict=True):
        torch.testing.assert_close(x[0], y, rtol=1e-6, atol=1e-6)
    # Gemma's RMSNorm hides it: centring shows in a model with LayerNorm, whose residuals it gives the mean 0.
    shape = {"n_layer": 4, "n_embd": 64, "n_head": 4, "vocab_size": len(reader.tokenizer)}
    gpt = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape)).eval()
    gpt.save_pretrained(tmp_path)
    reader.tokenizer.save_pretrained(tmp_path)
    of_gpt = load(dataclasses.replace(settings, model=str(tmp_path)), None)
    tokens = [of_gpt.tokenise(text)]
    with torch.no_grad():
        states = gpt(input_ids=torch.tensor(tokens), output_hidden_states=True).hidden_states
    x = of_gpt.residuals(tokens)[0][0]
    torch.testing.assert_close(x, states[LAYERS[0] + 1][0, -1], rtol=1e-5, atol=1e-6)
    assert abs(float(x.mean())) > 1e-3 * float(x.std())


def test_a_model_that_does_not_fit_is_said_in_a_line(settings, monkeypatch):
    def too_large(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(language_model, "load_sae", too_large)
    with pytest.raises(AnalysisError, match="does not fit into the memory of cpu"):
        load(settings, None)


# --- measures in their place


def test_noise_draws_are_averaged(reader, monkeypatch):
    few = SAMPLES[:5]
    together = batched(reader, 8, few, Measurer(reader, 42, 3))
    alone = []
    for draw in range(3):
        one = lambda *what, draw=draw: noise_of(what[0], what[1], 3, what[3])[draw : draw + 1]
        monkeypatch.setattr(batches, "noise_of", one)
        alone.append(batched(reader, 8, few, Measurer(reader, 42, 1)))
    for sample_id, row in together.items():
        for name in ("stability_fact", "stability_hall"):
            assert row[name] == pytest.approx(sum(rows[sample_id][name] for rows in alone) / 3)
    assert len({rows["stability_hall"] for found in alone for rows in found.values()}) > 1


def test_an_sae_that_remembers_its_last_input_is_decoded_before_it_encodes_noise(reader, monkeypatch):
    """SAELens's SAEs with layer_norm decode with the norm of what they encoded last."""
    sae, plain, last = reader.saes[0], reader.saes[0].encode, []

    def encode(x):
        last[:] = [x.norm(dim=1, keepdim=True)]
        return plain(x)

    monkeypatch.setattr(sae, "encode", encode)
    monkeypatch.setattr(sae, "decode", lambda f: f @ sae.W_dec * last[0])
    few = SAMPLES[:3]
    rows = batched(reader, 8, few)
    for sample in few:
        z = noise_of(42, sample.id, 2, reader.width)
        assert_equal(
            {sample.id: rows[sample.id]}, {sample.id: sequential.measure_sample(reader, sample, z, Clock())}
        )


def test_a_text_without_features_has_zeros_and_no_shape(reader, monkeypatch):
    monkeypatch.setattr(
        type(reader), "features", lambda self, i, x: torch.zeros(len(x), 512, dtype=torch.float64)
    )
    (row,) = batched(reader, 8, SAMPLES[:1]).values()
    assert row["l1_fact_shape_class"] == "None" and row["l2_hall_l0_norm"] == 0
    assert row["stability_fact"] == 1 and row["entropy_fact"] == 0 and row["centroid_drift_fact"] == 0
    z = noise_of(42, SAMPLES[0].id, 2, reader.width)
    assert_equal(
        {row["sample_id"]: row}, {SAMPLES[0].id: sequential.measure_sample(reader, SAMPLES[0], z, Clock())}
    )


def test_a_residual_stream_that_is_not_finite_ends_the_run(settings):
    broken = load(settings, None)
    with torch.no_grad():
        broken.model.original_model.lm_head.weight[7] = torch.inf  # tied to the embedding of token 7
    with pytest.raises(AnalysisError, match=r"layer 1 is not finite"):
        broken.residuals([[1, 7, 5]], 1)


def test_bfloat16_moves_numbers_a_little(reader, one_by_one, monkeypatch):
    monkeypatch.setattr(reader, "autocast", "bfloat16")
    found = pl.DataFrame(list(batched(reader, 8).values()))
    exact = pl.DataFrame([one_by_one[id_] for id_ in found["sample_id"]])
    moved = (found["l3_fact_reconstruction_error"] / exact["l3_fact_reconstruction_error"] - 1).abs()
    assert 1e-6 < moved.max() < 0.2
