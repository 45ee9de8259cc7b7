"""No circle of imports inside a package either: of two modules one can be read first."""

from harness.sources import imported, modules


def graph():
    """Which modules each module imports: at the top, late, and for types alone."""
    names = set(modules())
    return {
        name: {
            # An import from a package is of the module of that name, or of the package itself.
            target if target in names else target.rpartition(".")[0]
            for target, _line in imported(name, path)
        }
        & names
        for name, path in modules().items()
    }


def circles(edges):
    """The sets of nodes that can reach each other, of two and more."""

    def reachable(start):
        found, todo = set(), [start]
        while todo:
            for node in edges[todo.pop()] - found:
                found.add(node)
                todo.append(node)
        return found

    reach = {node: reachable(node) for node in edges}
    found = []
    for node in sorted(edges):
        circle = {node} | {other for other in reach[node] if node in reach[other]}
        if len(circle) > 1 and circle not in found:
            found.append(circle)
    return found


def test_circles_are_found():
    edges = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set(), "e": {"a", "f"}, "f": {"e"}}
    assert circles(edges) == [{"b", "c"}, {"e", "f"}]


def test_no_circle():
    assert circles(graph()) == []
