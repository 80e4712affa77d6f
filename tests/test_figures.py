"""What `python evaluate.py out/<run>` draws is what it says, on made-up numbers and on tiny runs."""
import errno
import os
import re
import shutil

import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.text import Text

import evaluate
import factorize
from harness import config, figures
from model import GPT, GPTConfig
from tasks import TASKS, Tokenizer
from test_pipeline import run


def run_continuous(name, *flags):
    """Factorizes in process, into a z of two dimensions, every stage in two steps."""
    factorize.factorize(config.load(factorize, [
        "configs/tiny_continuous.py", f"--name={name}", "--steps=4", "--cell_steps=2", "--eval_every=2",
        "--cluster_inputs=16", "--cluster_responses=6", "--cluster_searches=1", "--pool_size=32",
        "--validation_inputs=4", "--chunks=1", "--overwrite=True", *flags]))


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


@pytest.mark.parametrize("factorized, names", [
    (run, {"training.png", "matching.png", "router.png", "traces.png"}),
    (run_continuous, {"training.png", "latent_space.png"})])
def test_an_evaluation_draws_what_applies_to_the_run(workplace, monkeypatch, drawn, factorized, names):
    """Each strategy is named with its shares of the samples of the router and of the base in one of the figures."""
    against_base, found = evaluate.against_base, []
    monkeypatch.setattr(evaluate, "against_base", lambda *args: found.append(against_base(*args)) or found[-1])
    factorized("drawn", "--eval_inputs=8")
    for name in ("training", "latent_space", "traces", "matching", "router"):  # as the other kind of run leaves them
        shutil.copyfile("configs/tiny_base.py", f"out/drawn/{name}.png")
    evaluate.main(["out/drawn"])
    assert {name for name in os.listdir("out/drawn") if name.endswith(".png")} == names
    assert all(os.path.getsize(f"out/drawn/{name}") > 5000 for name in names)
    (_, shares, base_shares, *_), = found
    texts = [text.get_text().strip() for figure in drawn for axis in figure.axes for text in axis.findobj(Text)]
    for strategy, share, base_share in zip(TASKS["grid_pathfinding"].strategies, shares, base_shares):
        assert any(re.fullmatch(f"{strategy}\\s.*router {share:.0%}.*base {base_share:.0%}", text) for text in texts)


def test_a_figure_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    """A full disk is met after some bytes are written."""
    path = tmp_path / "training.png"
    path.write_text("before")

    def part_of(figure, file, **kwargs):
        file.write(b"part")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", part_of)
    with pytest.raises(SystemExit, match="cannot write .*training.png"):
        figures.draw_training([{"step": 1, "normalized_reconstruction": 1.0, "kl": 0.0}], str(path))
    assert path.read_text() == "before" and os.listdir(tmp_path) == ["training.png"]


def test_an_evaluation_in_training_logs_what_its_alignment_is_made_of(workplace):
    """alignment = max over matchings of sum_z C[z, pi(z)] / max(K, S), from the log's own C (K, S), which in the end is
    that of the model that was saved, on validation inputs."""
    log, _ = run("evaluated", "--n_latents=2", "--validation_inputs=64")
    entries = [entry for entry in log if "alignment_one_to_one" in entry]
    assert [entry["step"] for entry in entries] == [2, 4]
    for entry in entries:
        C = torch.tensor(entry["strategy_by_latent"])
        alignment = evaluate.one_to_one_matching(C)[0] / 3
        assert C.shape == (2, 3) and alignment == pytest.approx(entry["alignment_one_to_one"])
    _, _, task, tokenizer, model, _ = evaluate.load_run("out/evaluated")
    xs = evaluate.different_inputs(task, 64, "validation")
    again = evaluate.controlled(task, xs, evaluate.forced(model, tokenizer, xs, seed=3))[1]
    assert again.tolist() == C.tolist() and C.sum() > 0


def test_matching_shows_every_share_and_frames_the_strategy_of_each_latent(tmp_path, drawn):
    """C[z, s] in row z and column s; z3 is left over, and has no frame."""
    C = torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.3, 0.4]])
    figures.draw_matching(C, [1, 0, None], ("a", "b"), tmp_path / "matching.png")
    (axis,) = drawn[0].axes
    assert torch.equal(torch.tensor(axis.images[0].get_array()), C)
    texts = {text.get_position(): text.get_text() for text in axis.texts}
    assert texts == {(s, z): f"{C[z, s]:.2f}" for z in range(3) for s in range(2)}
    frames = [torch.tensor(line.get_xydata()) for line in axis.lines]
    assert [(frame.amin(dim=0) + frame.amax(dim=0)).mul(0.5).tolist() for frame in frames] == [[1, 0], [0, 1]]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["a", "b"]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["<z1>", "<z2>", "<z3>"]


def test_router_shows_the_shares_of_strategies_and_latents_on_each_kind_of_input(tmp_path, drawn):
    """Two bars a kind, of the base to the left and of the router to the right, each from 0 upwards: strategies in their
    order, latents in that of what they mean, and what is left over last, in black."""
    base = torch.tensor([[0.25, 0.75], [0.5, 0.5]])
    router = torch.tensor([[0.5, 0.125, 0.375], [0.25, 0.25, 0.5]])
    figures.draw_router(["wide", "tall"], router, base, [1, None, 0], ("_a", "b"), tmp_path / "router.png")
    (axis,) = drawn[0].axes
    found = [(round(bar.get_x() + bar.get_width() / 2, 6), bar.get_y(), bar.get_height(), to_hex(bar.get_facecolor()))
             for bar in axis.patches]
    blue, orange, black = map(to_hex, ("C0", "C1", "black"))
    assert sorted(found) == sorted([
        (-0.2, 0, 0.25, blue), (-0.2, 0.25, 0.75, orange), (0.8, 0, 0.5, blue), (0.8, 0.5, 0.5, orange),
        (0.2, 0, 0.375, blue), (0.2, 0.375, 0.5, orange), (0.2, 0.875, 0.125, black),
        (1.2, 0, 0.5, blue), (1.2, 0.5, 0.25, orange), (1.2, 0.75, 0.25, black)])
    assert [label.get_text() for label in axis.get_xticklabels()] == ["wide\nbase | router", "tall\nbase | router"]
    (legend,) = drawn[0].legends
    shown = zip(legend.get_patches(), legend.get_texts(), strict=True)
    shown = [(text.get_text().strip(), to_hex(patch.get_facecolor())) for patch, text in shown]
    assert shown == [("_a", blue), ("b", orange)]
    assert (tmp_path / "router.png").stat().st_size > 5000


def test_training_shows_its_curves(tmp_path, drawn):
    """Curves have every entry, those of evaluations every evaluation; a term without a share is left out."""
    log = [{"step": step, "normalized_reconstruction": 1 / step, "kl": 0.5, "loss_fraction_kl": 0.25,
            "loss_fraction_reconstruction": 0.75, "loss_fraction_jsd": 0.0,
            **({"local_strategy_coverage_mean": 1.0, "alignment_one_to_one": step / 20,
                "permutation_gap": 1 - step / 20} if step % 2 == 0 else {})} for step in range(1, 21)]
    figures.draw_training(log, tmp_path / "training.png")
    of_terms, shares, evaluated = drawn[0].axes
    lines = {line.get_label(): line.get_xydata().tolist() for axis in (of_terms, evaluated) for line in axis.lines}
    assert lines == {"R / c_base": [[step, 1 / step] for step in range(1, 21)],
                     "KL(q || p), nats": [[step, 0.5] for step in range(1, 21)],
                     "local coverage": [[step, 1.0] for step in range(2, 21, 2)],
                     "alignment": [[step, step / 20] for step in range(2, 21, 2)],
                     "permutation gap": [[step, 1 - step / 20] for step in range(2, 21, 2)]}
    assert [each.get_label() for each in shares.collections] == ["kl", "reconstruction"]


def test_the_latent_space_shows_how_far_samples_are_from_posterior_means(tmp_path, drawn):
    """Posterior means at 3 e_s, samples at 2 e_s, turned into another plane: the two marks of every strategy are 1
    apart in both panels, filled in that of their points. A strategy that the router never gives has one mark."""
    centres = torch.tensor([[1.0, 0], [-0.5, 0.75 ** 0.5], [-0.5, -0.75 ** 0.5]])
    turned = centres @ torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)))[0][:2]
    labels, found = torch.arange(30) % 3, torch.arange(40) % 2  # the third is never sampled
    found[-4:] = -1
    z = 2 * turned[found]
    figures.draw_latent_space(3 * turned[labels], labels, z, found, ("a", "b", "c"), tmp_path / "latent_space.png")
    of_means, of_samples = drawn[0].axes

    def marks(axis):  # (strategy, whether it is filled) -> place
        large = [each for each in axis.collections if each.get_sizes()[0] > 50]
        filled = [len(each.get_facecolor()) > 0 for each in large]
        colours = [to_hex((each.get_facecolor() if full else each.get_edgecolor())[0])
                   for each, full in zip(large, filled)]
        names = {to_hex(f"C{s}"): "abc"[s] for s in range(3)}
        return {(names[colour], full): torch.tensor(each.get_offsets()[0])
                for colour, full, each in zip(colours, filled, large)}

    shown = marks(of_means)
    assert set(shown) == {("a", True), ("b", True), ("c", True), ("a", False), ("b", False)}
    assert set(marks(of_samples)) == {(name, not filled) for name, filled in shown}
    for (name, filled), place in shown.items():
        assert place.norm() == pytest.approx(3 if filled else 2, abs=1e-4)
        assert torch.equal(marks(of_samples)[name, not filled], place)
        assert filled or (shown[name, True] - place).norm() == pytest.approx(1, abs=1e-4)
    points = [each for each in of_samples.collections if each.get_sizes()[0] < 50]
    assert [(each.get_label(), len(each.get_offsets())) for each in points] == [
        (" a", 18), (" b", 18), (" c", 0), (" none", 4)]


def test_traces_shows_every_step_of_every_solution_right_or_wrong(tmp_path, drawn, monkeypatch):
    """The base's samples first, then the latents' in order, each under the strategy that it follows, or none, in the
    strategy's colour."""
    task, x = TASKS["linear_equation_solving"], "3 x + 5 = 2 0".split()
    first, second, third = (task.trace(x, strategy) for strategy in task.strategies)
    wrong, tokenizer = "3 x = 9 9 ; ans 1 7".split(), Tokenizer(task.vocab, 3)
    base, model = (GPT(GPTConfig(len(tokenizer), 3, n_layer=1, n_embd=8, n_head=1)) for _ in range(2))
    says = [(base, 3 * [tokenizer.prompt(x)], [first, first, wrong]),
            (model, [tokenizer.prompt(x, k) for k in range(3)], [third, wrong, second])]
    monkeypatch.setattr(evaluate, "sample_ys", lambda model, tokenizer, prompts, generator: next(
        ys for who, asked, ys in says if who is model and asked == prompts))
    of_base, of_latents = evaluate.sample_traces((None, base, task, tokenizer, model, None), x, seed=0)
    figures.draw_traces(" ".join(x), of_base, of_latents, task.strategies, tmp_path / "traces.png")
    (axis,) = drawn[0].axes
    heads = [text for text in axis.texts if re.match("sample|<z", text.get_text())]
    bodies = [axis.texts[axis.texts.index(head) + 1] for head in heads]
    lines = [[[line.strip() for line in text.get_text().split("\n")] for text in texts] for texts in (heads, bodies)]
    a, b, c, none = *task.strategies, "no strategy"
    assert lines[0] == [["sample 1", a], ["sample 2", a], ["sample 3", none], ["<z1>", c], ["<z2>", none], ["<z3>", b]]
    for y, shown in zip((first, first, wrong, third, wrong, second), lines[1]):
        assert [line for line in shown if line] == " ".join(y).split(" ; ")
    colours = {a: "C0", b: "C1", c: "C2", none: "gray"}
    for (_, name), *texts in zip(lines[0], heads, bodies):
        assert {to_hex(text.get_bbox_patch().get_facecolor()) for text in texts} == {to_hex(colours[name])}
    assert "x = 3 x + 5 = 2 0" in [text.get_text() for text in axis.texts]
