import pyarrow as pa

from diptych.transforms.chunk import Reject
from diptych.transforms.sources.base import Row
from diptych.transforms.sources.planned.image_folder import ImageFile
from diptych.transforms.sources.planned.plan import (
    Entry,
    PlanFacts,
    plan_counters,
    plan_shards,
    read_facts,
    write_plan,
)


def entry(row, reason=None):
    image = None if reason else ImageFile(f"{row}.jpg")
    return Entry(row, f"k{row}", image, [f"c{row}"] if image else [], reason, "why" if reason else "", ["m"])


def facts(num_rows, **counters):
    sizes = [0] * max(1, -(-num_rows // 4))
    return PlanFacts({"source": "Test"}, num_rows, 4, sizes, counters)


def test_plan_has_a_batch_a_shard(tmp_path):
    url = str(tmp_path / "p.arrow")
    write_plan(url, facts(10), map(entry, range(10)), ["column"])
    with pa.ipc.open_file(url) as plan:
        assert [plan.get_batch(i).num_rows for i in range(plan.num_record_batches)] == [4, 4, 2]
    assert [shard.num_rows for shard in plan_shards(url, facts(10), "p", "", "s", ("column",))] == [4, 4, 2]


def test_facts_survive_the_file(tmp_path):
    url = str(tmp_path / "p.arrow")
    written = facts(3, unlisted_images=2)
    write_plan(url, written, map(entry, range(3)), ["column"])
    assert read_facts(url) == written
    assert read_facts(str(tmp_path / "other.arrow")) is None


def test_rows_and_rejects_come_back(tmp_path):
    url = str(tmp_path / "p.arrow")
    (tmp_path / "0.jpg").write_bytes(b"zero")
    write_plan(url, facts(2), [entry(0), entry(1, "missing_image")], ["column"])
    [shard] = plan_shards(url, facts(2), "p", str(tmp_path), "a.json", ("column",))
    assert list(shard.rows()) == [
        Row("k0", b"zero", "0.jpg", ["c0"], "a.json", 0, {"column": "m"}),
        Reject("k1", 1, "missing_image", "why"),
    ]


def test_counters_are_added_up_once_a_plan(tmp_path):
    shards = []
    for name, count in (("a", 2), ("b", 3)):
        url = str(tmp_path / f"{name}.arrow")
        write_plan(url, facts(8, unlisted_images=count), map(entry, range(8)), ["column"])
        shards += plan_shards(url, facts(8), name, str(tmp_path), None, ("column",))
    assert len(shards) == 4
    assert plan_counters(shards) == {"unlisted_images": 5}
    assert plan_counters([]) == {}
