"""The replay bench: small made-up files through the command, and what it says of bad ones."""

from __future__ import annotations

import ast
import csv
import inspect
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from django.core.management import CommandError, call_command

from bench.routing import policies
from bench.routing.data import read
from bench.routing.replay import replay
from bench.routing.world import Settings, World

MODELS = ("dear", "middling", "cheap")
RECORDED = Path(__file__).parent.parent.parent / "shared" / "data" / "routing"


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """Scores of three models at two tasks: each is best at one, the third is of no use."""
    rng = np.random.default_rng(5)
    means = {"sums": (0.9, 0.5, 0.2), "rhymes": (0.4, 0.8, 0.3)}
    with (tmp_path / "scores.csv").open("w", newline="") as file:
        write = csv.writer(file).writerow
        write(["task", "query_id", "split", "prompt_tokens_est", *MODELS])
        for n in range(300):
            task = ("sums", "sums", "rhymes")[n % 3]
            scores = (rng.random(3) < means[task]).astype(float)
            write([task, n, "train", int(rng.integers(10, 500)), *scores])
    (tmp_path / "models.csv").write_text(
        "model,size,input_price_per_m,output_price_per_m\n"
        "dear,70B,0.9,0.9\nmiddling,9B,0.3,0.3\ncheap,1B,0.1,0.1\nunused,1B,1,1\n"
    )
    return tmp_path / "scores.csv", tmp_path / "models.csv"


def test_the_command_prints_figures_beside_targets_and_draws_them(
    files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    scores, prices = files
    picture = tmp_path / "picture.svg"
    call_command(
        "replay_routing", scores, prices=prices, requests=600, seeds=2, processes=1, picture=picture
    )
    text = capsys.readouterr().out
    for part in ("share of the oracle", "≥ 0.950", "µs", "| UCB1 |", "| oracle | 1.000 |"):
        assert part in text
    drawing = ElementTree.fromstring(picture.read_text(encoding="utf-8"))
    assert len(drawing.findall("{http://www.w3.org/2000/svg}polyline")) == 8 + len(MODELS)


def test_the_bench_runs_the_code_that_serves_requests():
    from swapper import selection
    from swapper.learning.state import Learned

    names = vars(policies)
    assert names["selection"] is selection and names["Learned"] is Learned
    called = {
        ast.unparse(node.func)
        for node in ast.walk(ast.parse(inspect.getsource(policies.Learning).lstrip()))
        if isinstance(node, ast.Call)
    }
    assert {"selection.rank", "self.learned.apply", "self.learned.knowledge"} <= called


def test_a_replay_is_the_same_for_the_same_seed_and_begins_cold(files: tuple[Path, Path]):
    data, settings = read(*files), Settings(requests=400)
    one, same, other = (replay(data, settings, "errors", "learning", n) for n in (1, 1, 2))
    assert (one.chosen == same.chosen).all() and one.utility.sum() == same.utility.sum()
    assert (one.chosen != other.chosen).any()
    assert not policies.Learning(World(data, settings, "errors", 1, None), 1).learned.cells


def test_a_policy_hears_of_its_own_call_alone_and_when_it_is_over(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
):
    heard = []

    class Spy(policies.Random):
        def choose(self, index: int) -> int:
            self.now = index
            return super().choose(index)

        def hear(self, index, model, call, at):
            heard.append((index, model, at))
            assert index < self.now + 1

    monkeypatch.setitem(policies.POLICIES, "spy", Spy)
    data, settings = read(*files), Settings(requests=200)
    result = replay(data, settings, "hangs", "spy", 1)
    world = World(data, settings, "hangs", 1, None)
    for index, model, at in heard:
        assert result.chosen[index] == model and at > world.at[index]
    assert [at for *_, at in heard] == sorted(at for *_, at in heard)


def test_the_oracle_knows_of_outages(files: tuple[Path, Path]):
    world = World(read(*files), Settings(requests=1000), "errors", 1, None)
    during = world.oracle[world.first : world.last]
    assert MODELS[world.best] == "dear" and (during != world.best).all()
    assert world.call(world.first, world.best).error_kind == "server_error"
    assert world.call(world.first - 1, world.best).error_kind is None


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ("", "has no rows"),
        ("task,prompt_tokens_est,dear,cheap\n", "has no rows"),
        ("query,prompt_tokens_est,dear,cheap\na,1,0,1\n", "no column “task”"),
        ("task,prompt_tokens_est,dear\na,1,0\n", "two models"),
        ("task,prompt_tokens_est,dear,nobody\na,1,0,1\n", "no price for nobody"),
        ("task,prompt_tokens_est,dear,dear\na,1,0,1\n", "dear more than once"),
        ("task,prompt_tokens_est,dear,,cheap\na,1,0,,1\n", "column without a name"),
        ("task,prompt_tokens_est,dear,cheap\na,1,0,1\na,1,,1\n", "line 3: “” in dear"),
        ("task,prompt_tokens_est,dear,cheap\na,1,2,1\n", "line 2: dear is 2"),
        ("task,prompt_tokens_est,dear,cheap\na,nan,0,1\n", "line 2: prompt_tokens_est is nan"),
        ("task,prompt_tokens_est,dear,cheap\na,1e99,0,1\n", "from 0 to 100,000,000"),
        ("task,prompt_tokens_est,dear,cheap\na,1,0\n", "line 2: 3 values"),
        ("task,prompt_tokens_est,dear,cheap\n\na,1,0,1,1\n", "line 3: 5 values"),
        ("task,prompt_tokens_est,dear,cheap\n,1,0,1\n", "line 2: task is empty"),
        ('task,prompt_tokens_est,dear,cheap\n"a\nb",1,0,1\na,1,0,x\n', "line 4: “x” in cheap"),
        ('task,prompt_tokens_est,dear,cheap\n"a,1,0,1\n', "line 2: unexpected end"),
    ],
)
def test_a_bad_file_is_named_with_line_and_reason(
    files: tuple[Path, Path], scores: str, message: str
):
    files[0].write_text(scores)
    with pytest.raises(CommandError, match="csv") as error:
        call_command("replay_routing", files[0], prices=files[1])
    assert message in str(error.value)


def test_a_missing_file_or_a_price_that_is_none_is_said(files: tuple[Path, Path], tmp_path: Path):
    with pytest.raises(CommandError, match="can't be read"):
        call_command("replay_routing", tmp_path / "none.csv", prices=files[1])
    files[1].write_text("model,input_price_per_m,output_price_per_m\ndear,much,1\n")
    with pytest.raises(CommandError, match="line 2: “much” in input_price_per_m"):
        call_command("replay_routing", files[0], prices=files[1])
    files[1].write_text("model,input_price_per_m,output_price_per_m\ndear,1,1\ndear,1,1\n")
    with pytest.raises(CommandError, match="line 3: dear is there a second time"):
        call_command("replay_routing", files[0], prices=files[1])
    with pytest.raises(CommandError, match="100 requests"):
        call_command("replay_routing", files[0], prices=files[1], requests=5)


def test_a_model_without_a_price_takes_no_part_and_is_named(
    files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
):
    files[1].write_text(
        "model,input_price_per_m,output_price_per_m\ndear,0.9,0.9\ncheap,0.1,0.1\nmiddling,,0.3\n"
    )
    assert read(*files).models == ("dear", "cheap")
    call_command("replay_routing", files[0], prices=files[1], requests=100, seeds=1, processes=1)
    assert "left out, without a price: middling" in capsys.readouterr().out


def test_where_nothing_is_worth_its_price_no_share_is_made_up(
    files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
):
    files[1].write_text(
        "model,input_price_per_m,output_price_per_m\ndear,90000,90000\ncheap,90000,90000\n"
    )
    call_command("replay_routing", files[0], prices=files[1], requests=100, seeds=1, processes=1)
    text = capsys.readouterr().out
    assert "| share of the oracle's utility | – | ≥ 0.950 | no figure |" in text
    assert "--cost-weight" in text


@pytest.mark.parametrize(
    ("arrivals", "message"),
    [
        (None, "can't be read"),
        ("TIME\n1\n", "no column “TIMESTAMP”"),
        ("TIMESTAMP\n2026-01-01 00:00:00\nlater\n", "line 3: “later” is not a date"),
        ("TIMESTAMP\n2026-01-01 00:00:00\n", "two arrivals"),
    ],
)
def test_a_bad_arrivals_file_is_named_with_the_reason(
    files: tuple[Path, Path], tmp_path: Path, arrivals: str | None, message: str
):
    path = tmp_path / "arrivals.csv"
    if arrivals is not None:
        path.write_text(arrivals)
    with pytest.raises(CommandError, match=message):
        call_command("replay_routing", files[0], prices=files[1], arrivals=path)


@pytest.mark.skipif(not RECORDED.is_dir(), reason="the recorded scores are not on this machine")
def test_on_recorded_answers_it_leaves_a_dead_model_and_learns():
    data = read(RECORDED / "scores.csv", RECORDED / "models.csv")
    result = replay(data, Settings(), "errors", "learning", 1)
    assert result.share() > 0.90
    assert result.to_hurt <= 30
    assert result.back_seconds < 120
