"""The commands: folders, files, exit statuses, stopped runs, several processes, the Hub's cache."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import scipy.stats
import torch
import transformers
from conftest import DATA, LAYERS, LONGEST, script, undrawn
from sae_analysis import program, runs, workers
from sae_analysis.random_gemma import ACTIVE, make_random
from sae_analysis.samples import FILES, read_samples, spread
from sae_analysis.settings import parse_settings, parser_of
from sae_analysis.summary import as_text, compare
from sae_analysis.workers import ranges
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig

BATCHED, SEQUENTIAL = "06_comprehensive_analysis_parallel.py", "06_comprehensive_analysis.py"


def test_the_longest_tests_are_here():
    assert set(LONGEST) <= set(globals())


def content(folder):
    return (folder / "metrics.parquet").read_bytes()


# --- what a run writes


@pytest.mark.parametrize("name", [BATCHED, SEQUENTIAL])
def test_a_run_of_the_toy_writes_its_files_and_says_that_it_is_a_toy(run, tiny, name):
    status, folder, log = run(name, "--max-samples", "9", model=["--model", "tiny"], drawn=True)
    assert status == 0
    assert re.fullmatch(r"\d{8}_\d{6}(_\d+)?", folder.name)
    names = {
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name[0] != "."
    }
    figures = {f"figures/comprehensive_dashboard.{end}" for end in ("png", "pdf")}
    assert names == {"manifest.json", "metrics.parquet", "summary.csv"} | figures
    assert not list(folder.glob(".metrics*"))
    table = pl.read_parquet(folder / "metrics.parquet")
    assert table.height == 9 and table["domain"].unique().len() == 4
    assert table.null_count().sum_horizontal()[0] == 0
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["status"] == "finished" and "toy" in manifest["warning"].lower()
    assert log.count("TOY MODEL") == 2
    assert re.search(r"Progress: 9/9 samples \| Rate: \d+\.\d samples/sec \| ETA: 0s", log)
    assert re.search(r"Seconds: .*tokenise .*forward .*sae .*geometry .*write", log)
    assert {"tokenise", "forward", "sae", "geometry", "write", "load", "measuring"} <= set(
        manifest["seconds"]
    )
    assert manifest["peak_memory"]["host"] > 2**26 and manifest["settings"]["sae_release"] == ""
    assert "TOY" in pl.read_parquet_metadata(folder / "metrics.parquet")["warning"]
    assert set(pl.read_csv(folder / "summary.csv")["model"]) == {"tiny"}


def test_columns_have_the_names_of_the_original(run):
    _, folder, _ = run(BATCHED, "--max-samples", "4")
    expected = ["sample_id", "domain", "complexity"]
    for layer in (1, 2, 3):
        for text in ("fact", "hall"):
            for name in (
                "l0_norm",
                "reconstruction_error",
                "gini",
                "sphericity",
                "shape_class",
                "dimensionality",
            ):
                expected.append(f"l{layer}_{text}_{name}")
    for name in ("centroid_drift", "axis_twist", "stability", "entropy", "cross_layer_consistency"):
        expected += [f"{name}_fact", f"{name}_hall", f"{name}_diff"]
    table = pl.read_parquet(folder / "metrics.parquet")
    assert set(expected) <= set(table.columns)
    assert set(table.columns) - set(expected) == {
        f"residual_consistency_{end}" for end in ("fact", "hall", "diff")
    }
    signs = {"centroid_drift": 1, "axis_twist": 1, "entropy": 1, "stability": -1}
    signs |= {"cross_layer_consistency": -1, "residual_consistency": -1}
    for name, sign in signs.items():
        differences = sign * (table[f"{name}_hall"] - table[f"{name}_fact"])
        assert (differences - table[f"{name}_diff"]).abs().max() < 1e-12


def test_files_of_the_original_are_read_as_they_are(run, tmp_path):
    for domain, name in FILES.items():
        rows = json.loads((DATA / name).read_text())[:3]
        for i, row in enumerate(rows):
            row |= {"id": f"HB_{domain}_{i}", "domain": "geography", "complexity": "high" if i else 2}
        (tmp_path / name).write_text(json.dumps(rows))
    status, folder, _ = run(BATCHED, "--data-dir", str(tmp_path))
    table = pl.read_parquet(folder / "metrics.parquet")
    assert status == 0 and table["domain"].to_list() == [d for d in FILES for _ in range(3)]
    assert table["complexity"].to_list() == ["2", "high", "high"] * 4


# --- refusals


@pytest.mark.parametrize(
    "wrong, reason",
    [
        (["--layers", "1", "2"], "three or more"),
        (["--layers", "3", "2", "1"], "ascending"),
        (["--layers", "1", "2", "9"], "no SAE of layer 9"),
        (["--device", "cuda:7"], "not on this machine"),
        (["--device", "tpu"], "unknown device 'tpu'"),
        (["--load-in-8bit"], "pip install bitsandbytes"),
        (["--data-dir", "/nowhere"], "cannot read"),
        (["--model", "/nowhere/model"], "hf auth login.*local folder.*--model tiny"),
        (["--sae-release", "no-such-release"], "unknown SAE release"),
        (["--sae-release", "gemma-scope-2b-pt-res-canonical"], r"layer_1|cannot load"),
        (["--resume", "/nowhere"], "no manifest of a run"),
        (["--domains", "entity", "entity"], "named twice"),
        (["--resume", ""], "--resume is empty"),
        (["--model", "tiny", "--sae-release", "a"], "the toy has its own SAEs"),
    ],
)
def test_what_cannot_be_done_ends_with_status_2_and_one_line(run, wrong, reason, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    status, folder, log = run(BATCHED, "--max-samples", "4", *wrong)
    assert status == 2 and folder is None
    assert re.search(reason, log.splitlines()[-1])


def test_damaged_saes_and_saes_of_unequal_width_are_refused(run, toy, tmp_path):
    for name in ("damaged", "unequal"):
        shutil.copytree(toy, tmp_path / name)
    (tmp_path / "damaged" / "layer_2" / "sae_weights.safetensors").write_bytes(b"12345678901234567890")
    config = json.loads((toy / "layer_3" / "cfg.json").read_text()) | {"d_sae": 256}
    sae = JumpReLUSAE(JumpReLUSAEConfig.from_dict(config))
    sae.save_model(tmp_path / "unequal" / "layer_3")
    for name, reason in (
        ("damaged", "cannot load the SAE layer_2"),
        ("unequal", "unequal numbers of features"),
    ):
        status, _, log = run(BATCHED, "--max-samples", "4", "--sae-release", str(tmp_path / name))
        assert status == 2 and reason in log, name


def test_layers_that_the_toy_lacks_are_refused(run, tiny):
    status, _, log = run(BATCHED, "--layers", "5", "12", "20", model=["--model", "tiny"])
    assert status == 2 and "the toy has layers 0 to 3" in log


def test_a_folder_that_cannot_be_written_to_is_refused(flags, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    status = script(BATCHED).main([*flags, "--output-dir", str(tmp_path / "file" / "runs")])
    assert status == 2 and "choose another --output-dir" in capsys.readouterr().err


def test_an_sae_of_another_place_is_refused(run, toy, tmp_path):
    shutil.copytree(toy, tmp_path / "saes")
    shutil.rmtree(tmp_path / "saes" / "layer_2")
    shutil.copytree(toy / "layer_3", tmp_path / "saes" / "layer_2")
    status, folder, log = run(BATCHED, "--max-samples", "4", "--sae-release", str(tmp_path / "saes"))
    assert status == 2 and "was trained on blocks.3.hook_resid_post" in log and folder is None


# --- stopped runs


def test_a_run_that_failed_goes_on_where_it_stopped(run, monkeypatch):
    _, whole, _ = run(BATCHED, "--max-samples", "40", "--batch-size", "4")
    add, calls = runs.Run.add, []

    def failing(self, rows):
        calls.append(len(rows))
        if sum(calls) > 20:
            raise OSError("disk full")
        add(self, rows)

    monkeypatch.setattr(runs.Run, "add", failing)
    with pytest.raises(OSError, match="disk full"):
        run(BATCHED, "--max-samples", "40", "--batch-size", "4")
    stopped = max(whole.parent.iterdir(), key=lambda path: path.stat().st_mtime)
    manifest = json.loads((stopped / "manifest.json").read_text())
    assert manifest["status"] == "stopped" and "disk full" in manifest["reason"]
    with (stopped / runs.PART).open("ab") as file:
        file.write(b'5\n\n{"sample_id": "entity_050"}\n{"sample_id": "cut o')
    monkeypatch.setattr(runs.Run, "add", add)
    status, _, log = run(BATCHED, "--resume", str(stopped), model=[])
    assert status == 0 and re.search(r"Resumed: \d+ of 40 samples are finished", log)
    assert "WARNING: 4 damaged lines" in log
    assert content(stopped) == content(whole)
    status, _, log = run(BATCHED, "--resume", str(stopped), model=[])
    assert status == 0 and "is finished" in log


def test_a_resumed_run_keeps_its_settings_and_its_model(run, toy, tmp_path, monkeypatch):
    monkeypatch.setattr(program, "write_results", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    model = tmp_path / "model"
    shutil.copytree(toy, model)
    flags = [
        "--model",
        str(model),
        "--sae-release",
        str(model),
        "--layers",
        *map(str, LAYERS),
        "--device",
        "cpu",
    ]
    with pytest.raises(OSError):
        run(BATCHED, "--max-samples", "4", model=flags)
    (stopped,) = (tmp_path / "runs").iterdir()
    status, _, log = run(BATCHED, "--resume", str(stopped), "--seed", "7", model=[])
    assert status == 2 and "--seed differs from the run's (42)" in log
    with pytest.raises(SystemExit):  # no abbreviation, which would pass by the comparison
        run(BATCHED, "--resum", str(stopped), "--seed", "7", model=[])
    monkeypatch.setattr(runs, "MEASURES_VERSION", 0)
    status, _, log = run(BATCHED, "--resume", str(stopped), model=[])
    assert status == 2 and "the versions of this run changed" in log
    monkeypatch.undo()
    (model / "config.json").touch()
    status, _, log = run(BATCHED, "--resume", str(stopped), model=[])
    assert status == 2 and "the model of this run changed" in log


def test_a_resumed_run_refuses_samples_that_changed(run, tmp_path, monkeypatch):
    shutil.copytree(DATA, tmp_path / "data")
    monkeypatch.setattr(program, "write_results", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError):
        run(BATCHED, "--max-samples", "4", "--data-dir", str(tmp_path / "data"))
    (stopped,) = (tmp_path / "runs").iterdir()
    path = tmp_path / "data" / FILES["entity"]
    path.write_text(path.read_text().replace("Canberra", "Perth"))
    status, _, log = run(BATCHED, "--resume", str(stopped), model=[])
    assert status == 2 and "the samples of this run changed" in log


def test_a_full_disk_is_one_line_and_the_run_goes_on(run, monkeypatch, tmp_path):
    add = runs.Run.add

    def full(self, rows):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(runs.Run, "add", full)
    status, stopped, log = run(BATCHED, "--max-samples", "4")
    assert status == 1 and "make room, then --resume the run" in log.splitlines()[-1]
    monkeypatch.setattr(runs.Run, "add", add)
    assert run(BATCHED, "--resume", str(stopped), model=[])[0] == 0


def kill_in_the_middle(argv):
    """Run a version in a fork of this process, which kills itself when it adds rows for the fourth time.
    Returns how it ended. A process of its own would import TransformerLens anew, for a quarter of a minute.
    """
    pid = os.fork()
    if pid == 0:
        signal.alarm(300)  # rather than hang
        real, added = runs.Run.add, []

        def add(self, rows):
            added.append(rows)
            if len(added) == 4:
                os.kill(os.getpid(), signal.SIGKILL)
            real(self, rows)

        try:
            runs.Run.add = add
            script(SEQUENTIAL).main(argv)
        finally:
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_run_that_was_killed_goes_on_where_it_stopped(flags, run, tmp_path):
    _, whole, _ = run(BATCHED, "--max-samples", "40")
    runs_folder = tmp_path / "killed"
    more = [*flags, "--max-samples", "40", "--output-dir", str(runs_folder)]
    assert kill_in_the_middle(more) == -signal.SIGKILL
    (stopped,) = runs_folder.iterdir()
    status, _, log = run(BATCHED, "--resume", str(stopped), model=[])
    assert status == 0 and "Resumed: " in log
    found, expected = (pl.read_parquet(folder / "metrics.parquet") for folder in (stopped, whole))
    for name in expected.columns:
        if expected[name].dtype.is_float():
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-6, atol=1e-9)
        else:
            assert found[name].equals(expected[name])


# --- several processes


def test_two_workers_give_the_bytes_of_one_process(run):
    one, two = (run(BATCHED, "--max-samples", "24", *more)[1] for more in ([], ["--devices", "cpu", "cpu"]))
    assert content(one) == content(two)


def test_two_workers_of_ray_give_the_bytes_of_one_process(run):
    pytest.importorskip("ray", reason="pip install -r experiments/requirements-ray.txt")
    more = ["--ray", "local", "--devices", "cpu", "cpu"]
    one, two = (run(BATCHED, "--max-samples", "24", *flags)[1] for flags in ([], more))
    assert content(one) == content(two)


@pytest.mark.parametrize("count", [1, 2, 3, 50])
def test_ranges_are_contiguous_and_hold_every_batch_once(count, reader):
    from sae_analysis.batches import plan

    batches = plan(read_samples(DATA), reader.tokenise, 2)
    parts = ranges(batches, count)
    assert len(parts) == count and [batch for part in parts for batch in part] == batches
    tokens = [sum(len(text.tokens) for batch in part for text in batch) for part in parts]
    assert max(tokens) < sum(tokens) / count + 1000


# --- the Hub's layout


def test_gemma_and_gemma_scope_are_found_in_the_hubs_cache(run, tmp_path, monkeypatch):
    """The default names, offline, with small weights in files named and shaped as on the Hub."""
    hub, width, features = tmp_path / "hub", 2304, 16384

    def snapshot(repo):
        folder = hub / f"models--{repo.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text("a" * 40)
        return folder / "snapshots" / ("a" * 40)

    texts = [text for sample in spread(read_samples(DATA), 40) for text in sample.texts]
    from sae_analysis.toy import gemma, train_tokenizer

    tokenizer = train_tokenizer(texts)
    shape = {"num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    model = gemma(tokenizer, hidden_size=width, intermediate_size=64, **shape)
    model.save_pretrained(snapshot("google/gemma-2-2b"))
    tokenizer.save_pretrained(hub / "models--google--gemma-2-2b" / "snapshots" / ("a" * 40))
    saes = snapshot("google/gemma-scope-2b-pt-res")
    rng = np.random.default_rng(0)
    decoder = np.zeros((features, width), np.float32)
    decoder[:256] = rng.normal(size=(256, width)) / width**0.5
    params = {"W_dec": decoder, "W_enc": decoder.T, "threshold": np.full(features, 0.5, np.float32)}
    params |= {"b_enc": np.zeros(features, np.float32), "b_dec": np.zeros(width, np.float32)}
    np.savez(tmp_path / "params.npz", **params)
    for layer, active in enumerate((105, 102, 141)):
        folder = saes / f"layer_{layer}" / "width_16k" / f"average_l0_{active}"
        folder.mkdir(parents=True)
        os.link(tmp_path / "params.npz", folder / "params.npz")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(workers, "_measurers", {})  # the gigabytes of these SAEs are given back
    status, folder, log = run(BATCHED, "--layers", "0", "1", "2", "--max-samples", "4", model=[])
    assert status == 0, log
    table = pl.read_parquet(folder / "metrics.parquet")
    assert 0 < table["l1_fact_l0_norm"].mean() < 256
    assert json.loads((folder / "manifest.json").read_text())["model"]["commit"] == "a" * 40


# --- summary, figure, benchmark


def test_the_summary_is_a_paired_t_test_with_holm(run):
    _, folder, log = run(BATCHED, "--max-samples", "40")
    table, found = pl.read_parquet(folder / "metrics.parquet"), pl.read_csv(folder / "summary.csv")
    assert found.height == 21 * 4 and "of 84 comparisons differ at 5 %" in log
    own = table.filter(pl.col("domain") == "temporal")
    row = found.row(
        by_predicate=(pl.col("measure") == "stability") & (pl.col("domain") == "temporal"), named=True
    )
    test = scipy.stats.ttest_rel(own["stability_fact"], own["stability_hall"])
    assert row["p"] == pytest.approx(test.pvalue) and row["n"] == 10
    low, high = test.confidence_interval()
    assert (row["low"], row["high"]) == pytest.approx((low, high))
    assert row["cohens_d"] == pytest.approx(own["stability_diff"].mean() / own["stability_diff"].std())
    ordered = found["p"].sort().to_list()
    holm, largest = [], 0.0
    for i, p in enumerate(ordered):
        largest = max(largest, min(1.0, p * (len(ordered) - i)))
        holm.append(largest)
    assert found.sort("p")["p_holm"].to_list() == pytest.approx(holm)


def test_differences_without_spread_and_single_samples_are_dealt_with():
    from sae_analysis.rows import columns

    def table(drift, n):
        rows = {name: [0.5] * n for name in columns(LAYERS)}
        return pl.DataFrame(rows | {"domain": ["entity"] * n, "centroid_drift_hall": drift})

    found = compare(table([0.5] * 5, 5), LAYERS)
    assert set(found["p"]) == {1.0} and set(found["cohens_d"]) == {0.0}
    found = compare(table([1.5] * 5, 5), LAYERS)
    assert found.filter(pl.col("measure") == "centroid_drift")["mean_difference"][0] == 1
    assert set(found["p_holm"]) == {1.0}  # equal differences have no spread to test against
    original = table([0.1, 0.5, 0.4], 3).drop(
        [f"residual_consistency_{end}" for end in ("fact", "hall", "diff")]
    )
    assert compare(original, LAYERS).height == 20
    assert compare(table([0.5], 1), LAYERS).is_empty()
    assert "nothing is compared" in as_text(compare(table([0.5], 1), LAYERS))[0]


def test_an_effect_that_is_there_is_found_and_noise_is_not():
    from sae_analysis.rows import columns

    rng = np.random.default_rng(0)
    rows = {name: rng.normal(size=100) for name in columns(LAYERS)}
    rows |= {
        "domain": ["entity", "logical"] * 50,
        "entropy_hall": rows["entropy_fact"] + 1 + rng.normal(size=100),
    }
    found = compare(pl.DataFrame(rows), LAYERS).filter(pl.col("p_holm") < 0.05)
    assert found["measure"].to_list() == ["entropy", "entropy"]


def test_the_dashboard_is_drawn_from_a_folder_and_from_a_table(run, tmp_path, capsys):
    _, folder, _ = run(SEQUENTIAL, "--max-samples", "9")
    visualise = script("visualize_comprehensive.py")
    shutil.copy(folder / "metrics.parquet", tmp_path / "table.parquet")
    for source in (folder, tmp_path / "table.parquet"):
        assert visualise.main([str(source), "--output", str(tmp_path / "out")]) == 0
        png, pdf = (tmp_path / "out" / f"comprehensive_dashboard.{end}" for end in ("png", "pdf"))
        assert png.read_bytes()[:4] == b"\x89PNG" and pdf.read_bytes()[:4] == b"%PDF"
        assert png.stat().st_size > 50_000
    pl.DataFrame({"a": [1]}).write_parquet(tmp_path / "other.parquet")
    for wrong in (tmp_path / "nowhere", tmp_path / "other.parquet"):
        assert visualise.main([str(wrong)]) == 2
    assert "give a table of experiment 6" in capsys.readouterr().err
    table = pl.read_parquet(folder / "metrics.parquet")
    wrong = {"text": pl.lit("a"), "none": pl.lit(None, pl.Float64), "nan": pl.lit(float("nan"))}
    for kind, value in wrong.items():
        table.with_columns(entropy_fact=value).write_parquet(tmp_path / f"{kind}.parquet")
        assert visualise.main([str(tmp_path / f"{kind}.parquet")]) == 2, kind
    assert "entropy_fact does not hold a number in every row" in capsys.readouterr().err
    table.drop("l1_fact_shape_class").write_parquet(tmp_path / "other.parquet")
    assert visualise.main([str(tmp_path / "other.parquet")]) == 2


def test_the_benchmark_compares_versions_and_recommends_a_size(flags, capsys, monkeypatch):
    benchmark, ran = script("benchmark_versions.py"), []

    def in_this_process(command, **_):
        ran.append(Path(command[1]).name)
        status = script(ran[-1]).main(command[2:])
        return subprocess.CompletedProcess(command, status, "", capsys.readouterr().err)

    monkeypatch.setattr(benchmark.subprocess, "run", in_this_process)
    undrawn(monkeypatch)
    assert benchmark.main(["--quick", "--repeats", "1", "--batch-sizes", "4", "8", *flags]) == 0
    out = capsys.readouterr().out
    assert ran == [SEQUENTIAL, BATCHED, BATCHED]
    assert out.startswith("20 samples") and re.search(r"sequential .* 1\.0x", out)
    assert re.search(r"batch 8 .*\nRecommended here: --batch-size [48]", out)
    assert benchmark.main(["--data-dir", "/nowhere", *flags]) == 2
    assert "ended with status 2: cannot read" in capsys.readouterr().err
    sequential, small, large = (benchmark.Timing(20, seconds, 0, 0, 0) for seconds in (8, 2.08, 2))
    timings = {"sequential": sequential, "batch 4": small, "batch 8": large}
    lines = benchmark.table(timings)
    assert "4.0x" in lines[3] and lines[-1].endswith("--batch-size 4")  # within 5 % of the best


def test_the_random_gemma_has_its_shape(tmp_path):
    layers = make_random(tmp_path, [s.prompt for s in read_samples(DATA)], depth=13, width=64, features=128)
    assert layers == [2, 6, 10]
    flags = ["--model", str(tmp_path), "--sae-release", str(tmp_path), "--layers", *map(str, layers)]
    from sae_analysis.language_model import load

    reader = load(parse_settings(parser_of("", False), flags, {}), None)
    assert transformers.AutoConfig.from_pretrained(tmp_path).num_hidden_layers == 13
    f = reader.features(2, reader.residuals([[1, 5, 7]])[2])
    assert 0 < int((f > 0).sum()) <= ACTIVE and f.dtype == torch.float64
