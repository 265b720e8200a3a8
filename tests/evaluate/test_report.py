"""Facts of models: what is merged, what of a teacher is kept, the page of it, and the Pareto front."""

import base64
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from signbit.errors import DataError
from signbit.evaluate import kept
from signbit.evaluate.facts import Facts, merged, read_results, share_kept
from signbit.evaluate.page import Code, Fold, Page, Picture, Quote, Section, Table, html, markdown
from signbit.evaluate.plot import Quality, pareto, plot_quality
from signbit.evaluate.report import make_page, quality, summary
from signbit.hub.card import with_report

S = "asked_sha256"


def result(name, acc, chance=0.5, documents=100, acc_norm=None, tasks=(), **digest):
    values = {"acc": acc} | ({} if acc_norm is None else {"acc_norm": acc_norm})
    return digest | {
        "name": name, "values": values, "stderr": {"acc": 0.05}, "chance": chance, "documents": documents, "of": 100,
        "few_shot": 0, "version": "1", "source": "here", "tasks": list(tasks),
    }  # fmt: skip


def asked(*results, bos="nothing before a prompt"):
    protocol = {"bos": bos, "dtype": "float32", "activations": "exact", "device": "cpu"}
    return {"harness": "lm-eval 0.4.13", "limit": None, "protocol": protocol, "results": list(results)}


def ppl(value, protocol="wikitext2"):
    return {
        "protocol": protocol, "perplexity": value, "nll": 1.0, "windows": 3, "window": 64, "dtype": "float32",
        "activations": "exact", "device": "cpu", "seconds_s": 1.0,
    }  # fmt: skip


def size(mb, bits=None):
    packed = {} if bits is None else {"bits_per_weight": bits, "linears_saved": 1 - bits / 16, "kinds": []}
    return {"parameters": 100, "file_bytes": mb * 1e6, "bits_per_parameter": 8.0, "file_saved": 0.5, **packed}


TEACHER = Facts(
    "teacher", size=size(200), perplexities=(ppl(10.0),), tasks=(asked(result("a", 0.8), result("b", 0.6, 0.25)),)
)
MODEL = Facts(
    "one bit", "m", "f" * 64, "absmean (group=64)", "signbit quantize T -o M", size(20, 1.25), (ppl(40.0),),
    (asked(result("a", 0.65), result("b", 0.4, 0.25), result("both", 0.5, tasks=("a", "b"))),),
    layers=({"name": "blocks.0.up", "weights": 64, "nbytes": 10, "bits_per_weight": 1.25},),
)  # fmt: skip


def test_the_share_kept_and_the_share_above_chance():
    share = share_kept(MODEL, TEACHER)
    assert (share.model, share.teacher, share.chance) == pytest.approx((0.525, 0.7, 0.375))
    assert share.kept == pytest.approx(0.75)
    assert share.kept_above_chance == pytest.approx(0.15 / 0.325)
    assert share.tasks == ("a", "b"), "the group of both is no third task"
    guessing = Facts("g", tasks=(asked(result("a", 0.5)),))
    assert share_kept(guessing, TEACHER).kept_above_chance == 0
    assert share_kept(TEACHER, guessing).kept_above_chance is None


def test_in_the_mean_of_acc_norm_a_task_without_it_stands_with_its_acc():
    model = Facts("m", tasks=(asked(result("a", 0.5, acc_norm=0.9), result("b", 0.3)),))
    assert share_kept(model, TEACHER, "acc_norm").model == pytest.approx(0.6)


def test_documents_of_one_number_are_the_same_only_if_their_digests_are():
    mine, its, old = (Facts("m", tasks=(asked(result("a", 0.5, **d)),)) for d in ({S: "1"}, {S: "2"}, {}))
    assert share_kept(mine, mine) is not None and share_kept(mine, its) is None
    assert share_kept(mine, old) is not None and share_kept(old, its) is not None, "their number is all that is known"
    models = [replace(facts, name=name) for facts, name in ((mine, "one"), (mine, "two"), (its, "three"), (old, "old"))]
    text = markdown(make_page(models, None, None, [], {}))
    assert "| documents | one | two | old |" in text and "| documents | three |" in text, (
        "an old one stands by its number"
    )


HERE = {"signbit": "1", "torch": "2", "device": "a CPU"}
THERE = {"signbit": "1", "torch": "2", "backend": "cuda", "device": "a GPU"}


def test_the_page_names_the_machines_that_are_not_the_one_that_makes_it(tmp_path):
    path = tmp_path / "r.json"
    away = Facts("away", "/away", "a" * 64, perplexities=(ppl(9.0, "c4, first 2"),), tasks=(asked(result("a", 0.5)),))
    path.write_text(json.dumps({"models": [away.to_dict()]}))
    assert read_results(str(path))[0].measured_on == ({"what": ["perplexity c4", "tasks"]},)
    recorded = replace(away, measured_on=({"what": ["tasks"], **THERE},))
    path.write_text(json.dumps({"models": [recorded.to_dict()]}))
    (read,) = read_results(str(path))
    assert read.measured_on == ({"what": ["tasks"], **THERE}, {"what": ["perplexity c4"]})
    near = {"kl": 1.0, "teacher": "t", "top1": 0.5, "tokens": 1, "source": "s", "outcomes": 1, "mass": 1.0}
    at_hand = replace(
        MODEL, model_sha256="a" * 64, agreement=near, measured_on=({"what": ["agreement"], **HERE},), tasks=()
    )
    read = replace(read, agreement=near, measured_on=(*read.measured_on, {"what": ["agreement", "speed"], **THERE}))
    (both,) = merged([at_hand], [read])
    assert both.measured_on == (
        {"what": ["agreement"], **HERE}, {"what": ["tasks", "speed"], **THERE}, {"what": ["perplexity c4"]},
    ), "of two agreements that at hand is shown"  # fmt: skip
    text = markdown(make_page([both, TEACHER], TEACHER, None, [], HERE))
    assert "Made on: signbit 1, torch 2, a CPU." in text and text.count("a CPU") == 1
    assert "| one bit | signbit 1, torch 2, backend cuda, a GPU | tasks; speed |" in text
    assert "| one bit | not recorded | perplexity c4 |" in text
    assert "measured on" not in markdown(make_page([at_hand], None, None, [], HERE))


def test_the_page_gives_the_reason_that_held():
    near = {"kl": 1.0, "teacher": "t", "top1": 0.5, "tokens": 1, "source": "s", "outcomes": 1, "mass": 1.0}
    found = replace(MODEL, name="found", agreement=near)
    failed = replace(MODEL, name="failed", unknown={"agreement": "two vocabularies", "speed": "it was left out"})
    also, away = replace(failed, name="also"), replace(failed, name="away", source="a.json")
    old = Facts("old", source="b.json")
    text = markdown(make_page([failed, found, also, away, old, TEACHER], TEACHER, None, [], {}))
    part = text[text.index("## Agreement") : text.index("## Speed")]
    assert re.findall(r"^Not known.*$", part, re.MULTILINE) == [
        "Not known of failed, also: two vocabularies.",
        "Not known of away: a.json does not have it (two vocabularies), and the model was not at hand.",
        "Not known of old: b.json does not have it, and the model was not at hand.",
    ], "of the teacher there is nothing to know"
    assert "Not known of failed, also: it was left out." in text[text.index("## Speed") :]
    assert merged([failed], [replace(found, source="x", model_sha256=None, name="failed")])[0].unknown == {
        "speed": "it was left out"
    }


@pytest.mark.parametrize(
    "run", [asked(result("a", 0.65, documents=50)), asked(result("a", 0.65), bos="<s> before each prompt")]
)
def test_tasks_that_were_not_asked_alike_are_left_out(run):
    assert share_kept(Facts("m", tasks=(run,)), TEACHER) is None
    share = share_kept(Facts("m", tasks=(run, asked(result("b", 0.4)))), TEACHER)
    assert share.tasks == ("b",)


def test_of_several_ways_of_asking_the_common_one_is_set_beside_the_others_and_the_longest_is_told():
    def few(*scores):
        return asked(*(result(name, score, documents=50) for name, score in zip("ab", scores, strict=True)))

    teacher, model = (
        replace(facts, tasks=(run, *facts.tasks)) for facts, run in ((TEACHER, few(0.8, 0.8)), (MODEL, few(0.6, 0.4)))
    )
    others = [Facts(name, size=size(5), perplexities=(ppl(9.0),), tasks=(few(0.6, 0.6),)) for name in ("x", "y")]
    models = [model, *others, teacher]
    assert share_kept(model, teacher).model == pytest.approx(0.525), "over most documents"
    assert [row[6] for row in summary(models, teacher).rows] == ["50.0%", "60.0%", "60.0%", "80.0%"]
    assert [score for *_, score in quality(models, teacher)[1].points] == pytest.approx([50, 60, 60, 80])
    text = markdown(make_page(models, teacher, None, [], {}))
    rows = re.findall(r"^\| (one bit|x|y) \| acc \| (\S+) \| (\S+) \|.*\| (\S+) \|$", text, re.MULTILINE)
    few_rows = [("one bit", "50.0%", "80.0%", "100"), ("x", "60.0%", "80.0%", "100"), ("y", "60.0%", "80.0%", "100")]
    assert rows == [*few_rows, ("one bit", "52.5%", "70.0%", "200")]
    assert "| documents | one bit | x | y | teacher |" in text and "| documents | one bit | teacher |" in text


def test_means_over_other_tasks_are_not_set_beside_each_other():
    some = Facts("some", size=size(30), perplexities=(ppl(20.0),), tasks=(asked(result("b", 0.4, 0.25)),))
    other = Facts("others", size=size(40), tasks=(asked(result("a", 0.7, documents=50), result("b", 0.4, 0.25)),))
    _, scores = quality([MODEL, some, other, TEACHER], TEACHER)
    assert [name for name, _, _ in scores.points] == ["one bit", "teacher"]
    assert [row[6] for row in summary([MODEL, some, other], TEACHER).rows] == ["52.5%", "–", "–"]
    text = markdown(make_page([MODEL, some, other, TEACHER], TEACHER, None, [], {}))
    shares = re.findall(r"^\| (one bit|some|others) \| (acc|acc_norm) \|", text, re.MULTILINE)
    assert shares == [("one bit", "acc"), ("one bit", "acc_norm")]
    assert re.search(r"Without a share, for they were not asked all tasks of teacher alike.*: some, others\.", text)
    text = markdown(make_page([some, TEACHER], TEACHER, None, [], {}))
    assert "No other model was asked all tasks of teacher alike, so that no share is known. Without a share" in text


def test_documents_are_told_apart_where_they_differ(tmp_path):
    few = Facts("few", tasks=(asked(result("a", 0.7, documents=50)),))
    text = markdown(make_page([MODEL, few, TEACHER], TEACHER, tmp_path, [], {}))
    assert "| documents | few |" in text and "| 50 of 100 |" in text and "| 100 of 100 |" in text


def test_many_points_are_numbered(tmp_path):
    from matplotlib.figure import Figure

    drawn = []
    points = tuple((f"model {i}", 10.0 * i, 50.0 - i) for i in range(1, 6))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda figure, path, **_: drawn.append(figure))
        near = (*points, ("model 6", 50.1, 45.05))
        plot_quality([Quality("acc", p, 1) for p in (points, points[:4], near)], tmp_path / "q.png")
    many, few, on_each_other = drawn[0].axes
    assert [text.get_text() for text in on_each_other.texts] == ["1", "2", "3", "4", "5, 6"]
    assert [text.get_text() for text in many.texts] == ["1", "2", "3", "4", "5"]
    assert [text.get_text() for text in many.get_legend().get_texts()][1:] == [f"{i}  model {i}" for i in range(1, 6)]
    assert [text.get_text() for text in few.texts] == ["model 1", "model 2", "model 3", "model 4"]


def test_a_task_that_was_asked_twice_alike_is_one_result():
    runs = (asked(result("a", 0.1, documents=50)), asked(result("a", 0.9)), asked(result("a", 0.9)))
    assert [found["values"]["acc"] for _, found in Facts("m", tasks=runs).results()] == [0.1, 0.9]


def test_the_pareto_front():
    points = [
        ("dense", 200.0, 10.0),
        ("one", 20.0, 40.0),
        ("worse", 21.0, 41.0),
        ("as one", 20.0, 40.0),
        ("small", 5.0, 900.0),
    ]
    assert pareto(points, -1) == [0, 1, 3, 4]
    assert pareto(points, 1) == [4]
    assert pareto([("a", 1.0, 1.0), ("b", 1.0, 2.0)], 1) == [1]


def test_files_of_results_are_read_and_merged_by_hash(tmp_path):
    path = tmp_path / "eval.json"
    run = {"model": "/gpu/m", "model_sha256": "f" * 64, **asked(result("c", 0.5))}
    other = {"model": "/gpu/away", **ppl(33.0, "c4")}
    models = [{**MODEL.to_dict(), "name": "named there", "model": "/gpu/m", "tasks": [], "perplexities": []}]
    path.write_text(json.dumps({"signbit": "0", "models": models, "results": [other], "tasks": [run]}))
    found = merged([MODEL, TEACHER], read_results(str(path)))
    assert [facts.name for facts in found] == ["one bit", "teacher", "away"]
    assert [r["name"] for _, r in found[0].results()] == ["a", "b", "both", "c"]
    assert found[2].perplexities == (ppl(33.0, "c4"),) and found[2].source == str(path)
    assert found[0].source is None
    changed = {**run, "model_sha256": "e" * 64}
    path.write_text(json.dumps({"tasks": [changed]}))
    apart = merged([MODEL], read_results(str(path), "one bit"))
    assert [facts.name for facts in apart] == ["one bit (m)", "one bit (/gpu/m)"], "another model of this name"


@pytest.mark.parametrize(
    ("content", "message"),
    [("nothing", "is no file that --json"), ("[1]", "is no file that --json"), ("{}", "holds no model's results"),
     ('{"models": [{"strange": 1}]}', "is no file that --json"),
     ('{"models": [{"name": "m", "measured_on": [{"torch": "2"}]}]}', "is no file that --json")],
)  # fmt: skip
def test_what_is_no_file_of_results(content, message, tmp_path):
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        read_results(str(path))
    with pytest.raises(DataError, match="cannot be read"):
        read_results(str(tmp_path / "none.json"))


def test_a_name_is_for_one_model(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"results": [{"model": "a", **ppl(1.0)}, {"model": "b", **ppl(2.0)}]}))
    with pytest.raises(DataError, match="2 models are in it"):
        read_results(str(path), "name")


def test_the_page_says_what_is_known_and_what_is_not(tmp_path):
    pytest.importorskip("matplotlib", reason="the extra plot")
    page = make_page([MODEL, TEACHER], TEACHER, tmp_path, ["signbit report m"], {"torch": "2"})
    text = markdown(page)
    for known in (
        "1.250",
        "40.000",
        "4 ×",
        "75.0%",
        "46.2%",
        "65.0% ± 5.0%",
        "signbit quantize T -o M",
        "torch 2",
        "f" * 16,
    ):
        assert known in text
    assert "Not known of one bit: it was not measured." in text and "No text was written." in text
    assert "![Quality" in text and (tmp_path / "quality.png").stat().st_size > 5000
    assert "The error of the layers is not known" in text and (tmp_path / "layers.png").stat().st_size > 5000
    assert "![" not in markdown(page, level=2, pictures=False)
    alone = markdown(make_page([Facts("alone")], None, None, [], {}))
    assert (
        "There is no teacher" not in alone
        and "No task was asked" in alone
        and "The size of alone is not known" in alone
    )


def test_the_short_table_and_the_points_of_the_picture():
    table = summary([MODEL, TEACHER], TEACHER)
    row = dict(zip(table.columns, table.rows[0], strict=True))
    assert (row["bits/weight"], row["perplexity (wikitext2)"], row["kept"]) == ("1.250", "40.000", "75.0%")
    bare = summary([Facts("one"), Facts("two")], None)
    assert not any("perplexity" in column for column in bare.columns)
    assert [len(cells) for cells in bare.rows] == 2 * [len(bare.columns)]
    panels = quality([MODEL, TEACHER, Facts("no size", perplexities=(ppl(1.0),))], TEACHER)
    assert panels[0].points == (("one bit", 20e6, 40.0), ("teacher", 200e6, 10.0))
    assert panels[1].points[0] == ("one bit", 20e6, pytest.approx(52.5))


class _Seen(HTMLParser):
    def __init__(self):
        super().__init__()
        self.attributes, self.open, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.attributes += attrs
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_html_needs_no_other_file_and_says_the_same_as_the_markdown(tmp_path):
    picture = tmp_path / "x.png"
    picture.write_bytes(b"\x89PNG bytes")
    table = Table(("model", "what"), [("a|b", "<script>"), ("c", "1")], "a note")
    parts = [
        table,
        Picture(picture, "shows"),
        Quote("m", "Once", " upon\n<b>"),
        Code("signbit x"),
        Fold("more", table),
        "words",
    ]
    page = Page("title <1>", "about", [Section("part", parts)])
    seen = _Seen()
    seen.feed(html(page))
    assert seen.open == []
    links = [value for name, value in seen.attributes if name in ("src", "href")]
    assert links == ["data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()]
    assert ("name", "viewport") in seen.attributes and seen.attributes.count(("class", "wide")) == 2
    said = " ".join("".join(seen.text).split())
    for words in ("title <1>", "a|b", "<script>", "upon <b>", "signbit x", "a note"):
        assert words in said
    text = markdown(page)
    assert r"| a\|b | &lt;script> |" in text and "![shows](x.png)" in text and "```\nsignbit x\n```" in text
    assert re.search(r"\* m: Once \*\*upon &lt;b>\*\*", text)


@pytest.mark.parametrize(
    ("text", "line"), [(" upon ", "Once **upon**"), (", said", "Once**, said**"), ("  ", "Once **(nothing)**")]
)
def test_a_text_goes_on_from_its_prompt_as_it_was_written(text, line):
    assert f"* m: {line}" in markdown(Page("t", "a", [Section("s", [Quote("m", "Once", text)])]))


def test_a_card_takes_a_report_in_the_place_of_the_one_before():
    card = "---\ntags: [x]\n---\n# Model\n\nWords.\n"
    first = with_report(card, "## Report\n\nold\n")
    second = with_report(first + "\nAdded by hand.\n", "## Report\n\nnew\n")
    assert first.startswith(card) and "old" in first
    assert second.startswith(card) and "old" not in second and "new" in second and second.endswith("Added by hand.\n")
    assert second.count("<!-- signbit report -->") == 1


def test_what_was_measured_is_kept_by_model_and_protocol(tmp_path, monkeypatch):
    monkeypatch.setenv("SIGNBIT_CACHE", str(tmp_path))
    assert kept.recall("a" * 64, {"x": 1}) is None
    kept.keep("a" * 64, {"x": 1}, {"found": 2.5}, HERE)
    assert kept.recall("a" * 64, {"x": 1}) == ({"found": 2.5}, HERE)
    assert kept.recall("a" * 64, {"x": 2}) is None and kept.recall("b" * 64, {"x": 1}) is None
    (file,) = tmp_path.rglob("*.json")
    old = {key: value for key, value in json.loads(file.read_text()).items() if key != "measured_on"}
    file.write_text(json.dumps(old))
    assert kept.recall("a" * 64, {"x": 1}) == ({"found": 2.5}, {}), "of an older signbit, which recorded no machine"
    file.write_text(file.read_text()[:20])
    assert kept.recall("a" * 64, {"x": 1}) is None, "a damaged file is as none"
