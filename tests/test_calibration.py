"""Draft graphs: chosen by `calibrate`, kept beside a model, found by ``speculate``."""

import itertools
import json
import math
import re
from dataclasses import replace

import pytest
import torch
from tiny import EOS, MAKERS

import dllm_fast
from bench.quality import speculated
from dllm_fast import Ancestral, DraftGraph, Factor, Threshold, Uniform, calibration
from dllm_fast.cli.main import main
from dllm_fast.decoding import drafts


@pytest.fixture
def model():
    return dllm_fast.patch(MAKERS["llada"]().double(), impl="torch")


def prompts(count: int) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(count)
    return [torch.randint(0, EOS, (5 + n % 4,), generator=draw) for n in range(count)]


def taken(model, options: dict, speculate) -> int:
    found = dllm_fast.generate_many(model, prompts(6), batch_size=3, **options, speculate=speculate)
    return sum(done.nfe for done in found)


OPTIONS = [
    {"gen_length": 24, "block_length": 24, "schedule": Uniform(12), "cache": "none"},
    {"gen_length": 24, "block_length": 12, "schedule": Uniform(24)},
    {"gen_length": 24, "block_length": 8, "schedule": Uniform(9)},
    {"gen_length": 16, "block_length": 16, "schedule": Threshold(0.3)},
    {"gen_length": 16, "block_length": 16, "schedule": Uniform(8), "confidence": "entropy"},
    {"gen_length": 16, "block_length": 16, "schedule": Factor(0.5), "temperature": 0.2, "seed": 3},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_forwards_that_it_foresees_are_those_that_are_taken(model, options):
    paths = calibration.follow(calibration.record(model, prompts(6), 3, options))
    count, wanted = calibration.forwards(paths, set())
    assert count == taken(model, options, None) and wanted
    graphs = [calibration.choose(paths, n) for n in (1, 3, 7)]
    for graph in graphs:
        foreseen, _ = calibration.forwards(paths, set(graph.drafts))
        assert foreseen == taken(model, options, graph) < count
    chain = DraftGraph.chain(3)
    assert calibration.forwards(paths, set(chain.drafts))[0] == taken(model, options, chain)
    assert graphs[2].drafts[:3] == graphs[1].drafts and graphs[1].drafts[:1] == graphs[0].drafts
    found = dllm_fast.calibrate(model, prompts(6), 3, 4, **options)
    assert found.drafts == calibration.choose(paths, calibration.DRAFTS).drafts and found.evaluated == 3


def test_no_step_is_lost_where_drafts_may_look_ahead(model):
    options = {"gen_length": 24, "block_length": 8, "schedule": Uniform(12), "refresh": dllm_fast.Window(8, 0)}
    blocks = calibration.record(model, prompts(6), 1, options)
    assert sum(map(len, blocks)) == taken(model, options, None)


def test_one_sample_is_enough_for_a_fit(model):
    """Of one block of three steps only the first has a draft that may be of use."""
    options = {"gen_length": 24, "block_length": 24, "schedule": Uniform(3), "cache": "none"}
    for prompt in prompts(6):
        graph = dllm_fast.calibrate(model, [prompt], 1, **options)
        assert graph.weights is None or all(map(math.isfinite, itertools.chain(*graph.weights)))


def pruned_forwards(blocks, paths, graph: DraftGraph) -> int:
    """How many forwards the blocks take, each with the ``graph.evaluated`` drafts whose log-odds are the highest."""

    def likeliest(steps, n: int) -> set:
        base, odds = steps[n], {}
        for index, (ahead, own) in enumerate(graph.drafts):
            counts = [step.count for step in steps[n + 1 : n + 1 + ahead]] if base.planned else [base.count] * ahead
            ranks = set(range(sum(counts)) if own is None else own)
            scores = list(zip(base.score.tolist(), base.rank.tolist(), base.masked.tolist(), strict=True))
            committed = [math.log(score) for score, rank, masked in scores if masked and rank in ranks]
            left = [score for score, rank, masked in scores if masked and rank not in ranks]
            odds[index] = -math.inf
            if left:
                best = math.log(max(left) / (1 - max(left)))
                bias, weight, other = graph.weights[index]
                odds[index] = bias + weight * sum(committed) + other * best
        return {graph.drafts[n] for n in sorted(odds, key=lambda n: -odds[n])[: graph.evaluated]}

    count = 0
    for steps, path in zip(blocks, paths, strict=True):
        taken = 0
        while taken < len(steps):
            count, taken = count + 1, taken + 1
            drafted = likeliest(steps, taken - 2) if taken > 1 else set()
            for fitting in path[taken - 2] if taken > 1 else ():
                if not fitting & drafted:
                    break
                taken += 1
    return count


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_each_step_takes_the_likeliest_drafts(model, options):
    blocks = calibration.record(model, prompts(6), 3, options)
    paths = calibration.follow(blocks)
    graph = replace(calibration.choose(paths, 24), evaluated=2)
    graph = calibration.fit(calibration.samples(blocks, graph), paths, graph)
    assert len(graph.drafts) > 2
    doubtful = replace(graph, weights=tuple((n / 10, 0.7, n / 10 - 1.3) for n in range(len(graph.drafts))))
    graphs = graph, doubtful, replace(graph, evaluated=1), replace(graph, evaluated=len(graph.drafts))
    counts = [taken(model, options, each) for each in graphs]
    assert counts == [pruned_forwards(blocks, paths, each) for each in graphs]
    assert counts[3] < counts[2]  # each draft was chosen because it saves a forward
    # The calibrated graph is the better one of the likeliest drafts and the first.
    first = replace(graph, weights=None)
    better = graph if counts[0] < taken(model, options, first) else first
    assert dllm_fast.calibrate(model, prompts(6), 2, 4, **options) == better


def test_the_fit_is_the_likeliest(model):
    """No other weight of the scaled features makes what was reached, with the prior, likelier."""
    options = OPTIONS[0]
    blocks = calibration.record(model, prompts(6), 3, options)
    paths = calibration.follow(blocks)
    graph = calibration.choose(paths, 5)
    graph = calibration.fit(calibration.samples(blocks, graph), paths, graph)
    cases = [[] for _ in graph.drafts]  # of each draft, (its two features, whether it was reached)
    for steps, path in zip(blocks, paths, strict=True):
        for n, step in enumerate(steps):
            chosen = [
                torch.isin(step.rank, torch.tensor(own if own is not None else range(2 * ahead)))
                for ahead, own in graph.drafts
            ]
            found = drafts.features(step.score.double(), step.masked, torch.stack(chosen)).tolist()
            for of_draft, draft, (committed, left) in zip(cases, graph.drafts, found, strict=True):
                if left > -math.inf:
                    of_draft.append((committed, left, len(path[n]) >= draft[0] and draft in path[n][draft[0] - 1]))
    every = torch.tensor([case[:2] for of_draft in cases for case in of_draft], dtype=torch.float64)
    (mean, spread) = every.mean(0).tolist(), every.std(0).tolist()

    def likelihood(of_draft, bias, weight, other) -> float:
        """With the rate of being reached, to which the prior draws the scaled weights."""
        rate = (sum(hit for *_, hit in of_draft) + 0.5) / (len(of_draft) + 1)
        scaled = weight * spread[0], other * spread[1]
        shift = bias + weight * mean[0] + other * mean[1] - math.log(rate / (1 - rate))
        total = -(shift**2 + scaled[0] ** 2 + scaled[1] ** 2) / 2
        for committed, left, hit in of_draft:
            odds = bias + weight * committed + other * left
            total += math.log(1 / (1 + math.exp(-odds if hit else odds)))
        return total

    for of_draft, own in zip(cases, graph.weights, strict=True):
        best = likelihood(of_draft, *own)
        for n in range(3):
            for change in (-0.1, 0.1):
                moved = [x + change * (n == m) for m, x in enumerate(own)]
                assert likelihood(of_draft, *moved) < best


def test_each_choice_is_the_best_of_all_that_there_are(model):
    options = OPTIONS[0]
    paths = calibration.follow(calibration.record(model, prompts(6), 3, options))
    held = set(itertools.chain.from_iterable(fitting for block in paths for step in block for fitting in step))
    for n in range(1, 4):
        *before, last = calibration.choose(paths, n).drafts
        left = {draft: calibration.forwards(paths, {*before, draft})[0] for draft in held}
        assert left[last] == min(left.values())


def test_a_path_by_hand():
    """Positions 0 to 4; after a step 0 and 4 are there, and 2, 1, 3 follow in that order of confidence."""

    def step(block, masked, rank, token, count):
        wide = [torch.tensor(x) for x in (block, [bool(m) for m in masked], rank, token)]
        score = torch.zeros(5, dtype=torch.float64)  # which is not looked at
        return calibration.Taken(*wide[:2], score, *wide[2:], count, planned=False)

    first = step([7, 9, 9, 9, 8], [0, 1, 1, 1, 0], [3, 1, 0, 2, 4], [7, 5, 6, 4, 8], 1)
    second = step([7, 5, 9, 9, 8], [0, 0, 1, 1, 0], [2, 3, 0, 1, 4], [7, 5, 6, 4, 8], 1)
    third = step([7, 5, 6, 9, 8], [0, 0, 0, 1, 0], [2, 3, 4, 0, 1], [7, 5, 6, 3, 8], 1)
    last = step([7, 5, 6, 3, 8], [0, 0, 0, 0, 0], [0, 1, 2, 3, 4], [7, 5, 6, 3, 8], 1)
    (paths,) = calibration.follow([[first, second, third, last]])
    assert paths == [[{(1, (1,))}, {(2, (0, 1)), (2, None)}], [{(1, (0,)), (1, None)}], [], []]
    # Four steps: from the beginning; from `first`, then its drafts; from `last`'s own state none is left.
    assert calibration.forwards([paths], set()) == (4, {(1, (1,)): 1, (1, (0,)): 1, (1, None): 1})
    assert calibration.forwards([paths], {(1, (1,)), (2, None)})[0] == 2
    assert calibration.choose([paths], 2) == DraftGraph(((1, None),))


def test_a_model_finds_its_graphs(model, tmp_path):
    graph = DraftGraph(((1, (0, 2)), (1, None), (2, (0, 1, 2, 3)), (2, None)))
    path = drafts.write(tmp_path, "uniform 2", graph)
    other = DraftGraph(((1, None),), weights=((0.5, 1.0, -2.0),))
    drafts.write(tmp_path, "threshold=0.04", replace(other, evaluated=1))
    assert drafts.read(tmp_path) == {"uniform 2": graph, "threshold=0.04": other}
    assert list(json.loads(path.read_text())) == ["threshold=0.04", "uniform 2"] and len(list(tmp_path.iterdir())) == 1
    options = {"gen_length": 24, "block_length": 12, "schedule": Uniform(12)}
    own = [taken(model, options, DraftGraph(graph.drafts[:n])) for n in (1, 3, 4)]
    chains = [taken(model, options, n) for n in (1, 3, 4)]
    model.config._name_or_path = str(tmp_path)
    assert [taken(model, options, n) for n in (1, 3, 4, 9)] == [*own, own[-1]] != [*chains, chains[-1]]
    assert taken(model, options, DraftGraph.chain(3)) == chains[1]  # one that is given is taken as it is
    other = {**options, "schedule": Uniform(24)}
    assert taken(model, other, 3) == taken(model, other, DraftGraph.chain(3))


@pytest.mark.parametrize(
    ("schedule", "gen", "block", "key"),
    [
        (Uniform(32), 64, 32, "uniform 2"),
        (Uniform(22), 64, 64, "uniform 3"),
        (Uniform(4), 0, 32, None),
        (Threshold(0.9), 64, 32, "threshold=0.9"),
        (Ancestral(8, "cosine"), 64, 32, "ancestral=8,cosine"),
    ],
)
def test_names(schedule, gen, block, key):
    assert drafts.key_of(schedule, gen, block) == key
    other = key if key is None or isinstance(schedule, Ancestral) else f"{key}, entropy"
    assert drafts.key_of(schedule, gen, block, "entropy") == other


@pytest.mark.parametrize("text", ["{", "[1]", '{"a": 3}', '{"a": [[2, null]]}', '{"a": [[1, ["a"]]]}'])
def test_a_broken_file_is_named(model, tmp_path, text):
    (tmp_path / drafts.FILE).write_text(text)
    model.config._name_or_path = str(tmp_path)
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / drafts.FILE} holds no draft graphs: ")):
        taken(model, OPTIONS[0], 3)
    assert taken(model, OPTIONS[0], None)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"drafts": 0}, "drafts=0 is not"),
        ({"drafts": 64}, "drafts=64 is above 63"),
        ({"batch_size": "auto"}, "batch_size='auto' is not"),
        ({"speculate": 3}, "speculate: calibrate takes the steps without drafts"),
        ({"schedule": 3}, "schedule=3 is not"),
    ],
)
def test_a_bad_argument_of_calibrate(model, given, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        dllm_fast.calibrate(model, prompts(2), **{"gen_length": 8, "block_length": 8, **given})


def test_a_file_of_graphs(model, tmp_path):
    graph = DraftGraph(((1, (0, 1)), (1, (0, 2)), (2, None)))
    path = drafts.write(tmp_path, "uniform 2", graph)
    given = {"gen_length": 16, "block_length": 16}
    expected, found = (
        dllm_fast.generate(model, prompts(1)[0][None], **given, schedule=Uniform(8), speculate=how)
        for how in (graph, str(path))
    )
    assert torch.equal(found.sequences, expected.sequences)
    assert (found.nfe, found.states) == (expected.nfe, expected.states) and found.states > found.steps == 8
    with pytest.raises(ValueError, match="it has no drafts for uniform 4, but for uniform 2"):
        dllm_fast.generate(model, prompts(1)[0][None], **given, schedule=Uniform(4), speculate=str(path))


def test_the_command_line(tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("7+5=??;p*3=??;\n\n2+6=??;p*9=??;\n")
    given = ["calibrate", "--model", "llada-steps", "--gen-length", "32", "--schedule", "uniform=16"]
    given += ["--prompts", str(tmp_path / "prompts.txt"), "--drafts", "3"]
    assert main([*given, "--out", str(tmp_path)]) == 0
    graph = drafts.read(tmp_path)["uniform 2"]
    assert capsys.readouterr().out.startswith(f"{tmp_path / drafts.FILE}: uniform 2: {len(graph.drafts)} drafts, up to")
    assert 1 <= len(graph.drafts) <= calibration.DRAFTS
    asked = ["generate", *given[1:6], given[6], "--prompt", "7+5=??;p*3=??;", "--device", "cpu"]
    texts = []
    for more in ([], ["--speculate", str(tmp_path / drafts.FILE)]):
        assert main([*asked, *more]) == 0
        texts.append(capsys.readouterr().out.splitlines()[-1])
    assert texts[0] == texts[1]
    for extra, message in [
        (["--out", str(tmp_path / "none")], f"--out: {tmp_path / 'none'} is no folder to write drafts.json to"),
        (["--out", str(tmp_path), "--prompts", str(tmp_path)], "--prompts: "),
        (["--out", str(tmp_path), "--gen-length", "0"], "--schedule: with gen_length=0 "),
        (["--model", "nobody/nothing"], "nobody/nothing is not on this machine yet"),
    ]:
        assert main([*given, *extra]) == 2
        assert message in capsys.readouterr().err


def test_the_shipped_graphs_need_fewer_forwards_than_chains():
    rows = speculated.run("llada-steps", 12, 12, ["uniform 2"], ["none", "chain 7", "graph 7"])
    plain, chain, graph = rows[3:]
    assert (plain.cache, plain.states, plain.taken) == ("none", plain.forwards, [])
    assert graph.forwards < chain.forwards < plain.forwards and not any(row.differ for row in rows)
    assert sum(graph.taken) == round(12 * graph.forwards) and len(graph.taken) <= 8
    assert sum(n * steps for n, steps in enumerate(graph.taken, 1)) == 12 * 32
    assert speculated.table(rows)[5][:3] == ["none", "uniform 2", "graph 7"]
