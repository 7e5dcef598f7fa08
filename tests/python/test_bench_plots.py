"""`dsv4-ascend bench --plot`: curves say what rows say, and are drawn where matplotlib is."""

from xml.etree import ElementTree

from bench_sizes import run, shrink_suites

from dsv4_ascend.bench import layers, long_context, plots
from dsv4_ascend.bench.machine import Limits
from dsv4_ascend.bench.ops import Ops
from dsv4_ascend.bench.timing import Timing
from dsv4_ascend.bench.work import Row


def flat(seconds):
    return Timing(seconds, seconds, seconds)


def row(operator, traffic, flops, seconds=1.0):
    rates = traffic / seconds, flops / seconds
    own = flat(seconds)
    return Row(operator, "", 1, "", traffic, flops, own, "", own, {}, {}, 1.0, *rates, 0.5)


def test_the_roof_bends_where_limits_meet():
    found = Ops(Limits(2e9, 8e9), [row("a", 10, 10), row("a", 10, 200), row("b", 5, 0)])
    roof, *points = plots.roofline(found).curves
    assert roof.points == ((1.0, 2.0), (4.0, 8.0), (20.0, 8.0))
    assert points == [plots.Curve("a", ((1.0, 1e-8), (20.0, 2e-7)), joined=False)]


def test_a_roof_without_a_bend_in_sight():
    roof = plots.roofline(Ops(Limits(1e9, 100e9), [row("a", 10, 10), row("a", 10, 20)])).curves[0]
    assert roof.points == ((1.0, 1.0), (2.0, 2.0))


def test_times_against_the_context():
    rows = [
        long_context.Growth(c, flat(1e-3 * c), flat(2e-3), flat(3e-3), 1.0, 1.0, None, None)
        for c in (64, 128)
    ]
    curves = {c.label: c.points for c in plots.attention(rows).curves}
    assert curves["CSA: indexer"] == ((64, 64.0), (128, 128.0))
    assert curves["HCA: attention"] == ((64, 3.0), (128, 3.0))
    one = [layers.Row("csa", c, 1, 0, flat(c / 1e3), 1.0) for c in (1, 2)]
    prompt = layers.Row("csa", 9, 9, 0, flat(9), 1.0)
    (curve,) = plots.whole_layers([*one, prompt]).curves
    assert curve == plots.Curve("csa", ((1, 1.0), (2, 2.0)))


def test_pictures_of_a_run(monkeypatch, tmp_path):
    shrink_suites(monkeypatch)
    folder = tmp_path / "new" / "pictures"
    suites = "--suite", "ops", "--suite", "long-context"
    done = run(*suites, "--rounds", "2", "--plot", str(folder))
    assert done.exit_code == 0, done.output
    assert {path.name for path in folder.iterdir()} == {"roofline.svg", "attention.svg"}
    for path in folder.iterdir():
        assert ElementTree.parse(path).getroot().tag.endswith("svg")


def test_a_run_without_a_picture_says_so(monkeypatch, tmp_path):
    shrink_suites(monkeypatch)
    done = run("--suite", "ops", "-k", "topk_indices", "--rounds", "2", "--plot", str(tmp_path))
    assert done.exit_code == 0, done.output
    assert "no picture" in done.stderr
    assert not list(tmp_path.iterdir())


def test_wrong_options_leave_no_folder(tmp_path):
    folder = tmp_path / "folder"
    assert run("--device", "npu", "--plot", str(folder)).exit_code == 2
    assert not folder.exists()


def test_without_matplotlib_nothing_is_measured(monkeypatch, tmp_path):
    monkeypatch.setattr("dsv4_ascend.cli.bench.find_spec", lambda name: None)
    done = run("--suite", "ops", "--plot", str(tmp_path))
    assert done.exit_code == 2
    assert "pip install" in done.output


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    done = run("--suite", "ops", "--plot", str(tmp_path / "file" / "folder"))
    assert done.exit_code == 2
    assert "--plot" in done.output
