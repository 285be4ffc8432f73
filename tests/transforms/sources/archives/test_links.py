import pytest

from diptych.transforms.sources.archives import links
from diptych.transforms.sources.archives.links import Link, LinkError, Links


def links_of(targets):
    found = Links()
    for name, target in targets.items():
        found.add(name, Link(target))
    return found


def test_links_of_links_and_of_folders():
    chain = links_of({"./a": "b", "b": "c/d", "c": "e", "self": "self"})
    assert [chain.resolve(target) for target in ("a", "./b", "c/x/../d", "self", "f")] == [
        "e/d",
        "e/d",
        "e/d",
        "self",
        "f",
    ]
    names = {target: [name for name, _ in found] for target, found in chain.resolved().items()}
    assert names == {"e/d": ["a", "b"], "e": ["c"], "self": ["self"]}


def test_a_chain_is_followed_over_forty_links():
    targets = {f"{number}": f"{number + 1}" for number in range(60)}
    assert links_of(targets).resolve("20") == "60"
    with pytest.raises(LinkError, match="over more than 40"):
        links_of(targets).resolve("19")


@pytest.mark.parametrize("targets", [{"a": "b", "b": "a"}, {"a": "a/b"}, {"a": "b/c", "b": "a"}])
def test_circles(targets):
    circle = links_of(targets)
    with pytest.raises(LinkError, match="round in a circle") as caught:
        circle.resolve("a")
    assert caught.value.reason == "missing_image"
    assert circle.resolved() == {}


def test_what_does_not_fit_is_counted(monkeypatch):
    monkeypatch.setattr(links, "_MAX_BYTES", 1200)
    some = links_of({f"{i}": "x" for i in range(5)})
    assert (len(some), some.num_passed_over) == (2, 3)


def test_paths_that_no_system_has_lead_nowhere():
    assert len(links_of({"a": "x/" * 500_000})) == 0
    with pytest.raises(LinkError):
        Links().resolve("x/" * 500_000)
