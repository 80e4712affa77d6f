"""What `python evaluate.py out/<run> --figures` draws is what it says, on made-up numbers and on tiny runs."""
import json
import os
import random

import pytest
import torch

import evaluate
import figures
import metrics
import train_base
from model import GPT, GPTConfig, Pairs, pad
from posterior import one_to_one_matching
from tasks import TASKS, Tokenizer
from test_pipeline import CONTINUOUS, run


@pytest.fixture
def drawn(monkeypatch):
    """The matplotlib figures drawn by a test, in order."""
    made, new_figure = [], figures.new_figure

    def spy(*args, **kwargs):
        figure, axes = new_figure(*args, **kwargs)
        made.append(figure)
        return figure, axes

    monkeypatch.setattr(figures, "new_figure", spy)
    return made


@pytest.mark.parametrize("flags, names", [([], {"traces.png", "dynamics.png", "decodability.png"}),
                                          (CONTINUOUS, {"centroids.png", "decodability.png"})])
def test_figures_draws_what_applies_to_the_run_and_names_each_file(workplace, capsys, flags, names):
    run("drawn", *flags, "--eval_inputs=64")
    for name in os.listdir("out/drawn"):  # of the other kind of run
        if name.endswith(".png"):
            os.remove(f"out/drawn/{name}")
    capsys.readouterr()
    evaluate.main(["out/drawn", "--figures"])
    assert set(capsys.readouterr().out.split()) == {os.path.join("out/drawn", name) for name in names}
    assert {name for name in os.listdir("out/drawn") if name.endswith(".png")} == names
    assert all(os.path.getsize(f"out/drawn/{name}") > 5000 for name in names)


def test_the_strategy_is_at_chance_before_y_and_known_when_y_is_read(workplace, monkeypatch):
    """Traces by a strategy drawn without regard to x stand in for samples of the base. <y> has seen x alone, so
    position 0 is at chance; one token, right or down, tells one of three strategies from the two others: 2/3; after two
    steps both layers know. The embedding sees one token and never does."""
    base, task, _ = train_base.load_base("out/tiny_base/ckpt.pt")
    tokenizer, rng = Tokenizer(task.vocab), random.Random(0)

    def traces(base, prompts, generator):
        records = []
        for p in prompts:
            x = tokenizer.decode(p[2:-2])
            records.append(tokenizer.record(x, task.trace(x, rng.choice(task.strategies))))
        return Pairs(pad(records), torch.tensor([len(p) for p in prompts]), torch.zeros(len(records), 1))

    monkeypatch.setattr(metrics, "sample_pairs", traces)
    xs = metrics.different_inputs(task, 120, test=False)
    positions, accuracy, chance = metrics.decodability(base, task, tokenizer, xs, 4, seed=0)
    assert positions[:13] == list(range(13)) and accuracy.shape == (3, len(positions)) == (3, len(chance))
    assert (chance - 1 / 3).abs().max() < 0.1
    assert (accuracy[:, 0] - 1 / 3).abs().max() < 0.1, "what is known at <y> is not of y"
    assert (accuracy[:, 1] - 2 / 3).abs().max() < 0.1
    assert accuracy[1:, positions.index(8)].min() > 0.9 and accuracy[0, positions.index(8)] < 0.5


def test_a_base_without_strategies_has_no_position_to_decode(workplace, monkeypatch):
    """A base with random weights follows none: nothing to probe, and no error."""
    _, task, checkpoint = train_base.load_base("out/tiny_base/ckpt.pt")
    base, tokenizer = GPT(GPTConfig(**checkpoint["model_config"])).requires_grad_(False), Tokenizer(task.vocab)
    xs = metrics.different_inputs(task, 4, test=True)
    positions, accuracy, _ = metrics.decodability(base, task, tokenizer, xs, 2, seed=0)
    assert positions == [] and accuracy.shape == (3, 0)


def test_a_look_logs_what_its_alignment_is_made_of(workplace):
    """alignment = max over matchings of sum_z C[z, pi(z)] / max(K, S), from the log's own C (K, S), which in the end is
    that of the model that was saved."""
    log, _ = run("looks", "--n_latents=2", "--look_inputs=64")
    looks = [entry for entry in log if "alignment_one_to_one" in entry]
    assert len(looks) == 2
    for entry in looks:
        C = torch.tensor(entry["strategy_by_latent"])
        assert C.shape == (2, 3) and one_to_one_matching(C)[0] / 3 == pytest.approx(entry["alignment_one_to_one"])
    _, _, task, tokenizer, model, _ = evaluate.load_run("out/looks")
    xs = metrics.different_inputs(task, 64, test=False)
    assert metrics.controlled(model, task, tokenizer, xs, seed=3)[1].tolist() == C.tolist() and C.sum() > 0


def test_dynamics_shows_five_looks_and_ends_in_a_diagonal(tmp_path, drawn):
    """z1, z2, z3 mean the third, the first and the second strategy in the end: rows are ordered z2, z3, z1."""
    swapped = torch.eye(3)[[2, 0, 1]]
    looks = [{"step": i, "strategy_by_latent": (i / 99 * swapped).tolist(), "alignment_one_to_one": i / 99,
              "local_strategy_coverage_mean": 1.0, "permutation_gap": 1 - i / 99} for i in range(9, 100, 9)]
    figures.draw_dynamics(looks, ("a", "b", "c"), tmp_path / "dynamics.png")
    curves, *maps = drawn[0].axes
    assert [axis.get_title() for axis in maps] == [f"step {step}" for step in (9, 27, 54, 72, 99)]
    assert torch.equal(torch.tensor(maps[-1].images[0].get_array()), torch.eye(3))
    assert [label.get_text() for label in maps[0].get_yticklabels()] == ["<z2>", "<z3>", "<z1>"]
    lines = {line.get_label(): list(line.get_ydata()) for line in curves.lines}
    assert lines["alignment"] == [i / 99 for i in range(9, 100, 9)] and set(lines["coverage"]) == {1.0}
    assert lines["permutation gap"][0] == 1 - 9 / 99


def test_what_cannot_be_drawn_is_said_in_one_line(workplace, capsys):
    """A log of an earlier version, without C; and twelve samples of a base, too few for a probe. The rest is drawn."""
    run("early", "--steps=1", "--eval_inputs=2")
    with open("out/early/log.jsonl") as f:
        entry = json.loads(f.readline())
    with open("out/early/log.jsonl", "w") as f:
        f.write(json.dumps({key: value for key, value in entry.items() if key != "strategy_by_latent"}) + "\n")
    evaluate.main(["out/early", "--figures"])
    out = capsys.readouterr().out
    assert "no dynamics.png: log.jsonl" in out and "no decodability.png: too few" in out
    assert {name for name in os.listdir("out/early") if name.endswith(".png")} == {"traces.png"}
    with pytest.raises(SystemExit, match="known: .*--figures"):
        evaluate.main(["out/early", "--figure"])


def test_centroids_joins_the_two_means_of_each_strategy(tmp_path, drawn):
    """Posterior means at 3 e_s, samples at 2 e_s, turned into another plane: every line is 1 long. A strategy that the
    router never gives has none."""
    corners = torch.tensor([[1.0, 0], [-0.5, 0.75 ** 0.5], [-0.5, -0.75 ** 0.5]])
    turned = corners @ torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)))[0][:2]
    labels, found = torch.arange(30) % 3, torch.arange(40) % 2  # the third is never sampled
    found[-4:] = -1
    figures.draw_centroids(3 * turned[labels], labels, 2 * turned[found], found, ("a", "b", "c"), tmp_path / "c.png")
    lines = {line.get_label(): torch.tensor(line.get_xydata()) for line in drawn[0].axes[0].lines}
    for name in "ab":
        start, end = lines[name]
        assert start.norm() == pytest.approx(3, abs=1e-4) and (start - end).norm() == pytest.approx(1, abs=1e-4)
    assert "c" not in lines


def test_traces_shows_every_step_of_every_solution_right_or_wrong(tmp_path, drawn, monkeypatch):
    """The base's samples first, then the latents' in order, each under the strategy that it follows, or none."""
    task = TASKS["linear_equation_solving"]
    x = "3 x + 5 = 2 0".split()
    first, second, third = (task.trace(x, strategy) for strategy in task.strategies)
    wrong = "3 x = 9 9 ; ans 1 7".split()
    answers = iter([[first, first, wrong], [third, wrong, second]])
    monkeypatch.setattr(figures, "sample_ys", lambda *args: next(answers))
    tokenizer = Tokenizer(task.vocab, 3)
    model = GPT(GPTConfig(len(tokenizer), 3, n_layer=1, n_embd=8, n_head=1))
    figures.draw_traces(None, model, task, tokenizer, x, 0, tmp_path / "traces.png")
    shown = [text.get_text() for text in drawn[0].axes[0].texts]
    heads = [(text, shown[i + 1]) for i, text in enumerate(shown) if text.startswith(("sample", "<z"))]
    a, b, c, none = *task.strategies, "no strategy"
    assert heads == [("sample 1", a), ("sample 2", a), ("sample 3", none), ("<z1>", c), ("<z2>", none), ("<z3>", b)]
    for y in (first, second, third, wrong):
        for line in " ".join(y).split(" ; "):
            assert line in shown
    assert shown.count("3 x = 9 9") == 2 and shown.count("ans 1 7") == 2
