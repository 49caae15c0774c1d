"""Rules of the shipped code that no reviewer should have to look for: nothing unpickled, evaluated or given to a shell.

A rule is a predicate over calls; a file may be excused by name with the reason.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ("brainloom", "flows", "tasks", "models", "infra", "bench", "studies")
UNPICKLE = {
    f"{module}.{name}"
    for module in ("pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "pd", "pandas")
    for name in ("load", "loads", "Unpickler", "open", "read_pickle")
} - {"pd.open", "pandas.open"}
SHELLS = {"os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "commands.getoutput"}
SAFE_LOADERS = {"yaml.SafeLoader", "SafeLoader", "yaml.CSafeLoader"}


def name_of(node: ast.AST) -> str:
    """Return a dotted name, e.g. `torch.load`; empty for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    return f"{name_of(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else ""


def keyword(call: ast.Call, name: str) -> object:
    """Return a keyword's constant; None when it is not given or no constant."""
    found = next((k.value for k in call.keywords if k.arg == name), None)
    return found.value if isinstance(found, ast.Constant) else None


def unpickles(call: ast.Call, safe: frozenset[str]) -> bool:
    return name_of(call.func) in UNPICKLE


def loads_torch_unsafely(call: ast.Call, safe: frozenset[str]) -> bool:
    return name_of(call.func) == "torch.load" and keyword(call, "weights_only") is not True


def lets_numpy_unpickle(call: ast.Call, safe: frozenset[str]) -> bool:
    return keyword(call, "allow_pickle") not in (None, False)


def evaluates(call: ast.Call, safe: frozenset[str]) -> bool:
    plain = isinstance(call.func, ast.Name) and call.func.id in {"eval", "exec", "compile", "__import__"}
    return plain or name_of(call.func) in {"builtins.eval", "builtins.exec"}


def loads_yaml_unsafely(call: ast.Call, safe: frozenset[str]) -> bool:
    name = name_of(call.func)
    if name in {"yaml.unsafe_load", "yaml.full_load", "yaml.load_all", "yaml.unsafe_load_all", "yaml.full_load_all"}:
        return True
    loader = [*call.args[1:2], *(k.value for k in call.keywords if k.arg == "Loader")]
    return name == "yaml.load" and not (loader and name_of(loader[0]) in SAFE_LOADERS | safe)


def uses_a_shell(call: ast.Call, safe: frozenset[str]) -> bool:
    return name_of(call.func) in SHELLS or keyword(call, "shell") not in (None, False)


def parses_xml_with_entities(call: ast.Call, safe: frozenset[str]) -> bool:
    return name_of(call.func).startswith(("ET.", "ElementTree.", "xml.", "minidom.", "sax."))


RULES: dict[str, Callable[[ast.Call, frozenset[str]], bool]] = {
    "nothing is unpickled": unpickles,
    "torch.load has weights_only=True": loads_torch_unsafely,
    "numpy unpickles nothing": lets_numpy_unpickle,
    "no eval, exec, compile": evaluates,
    "YAML is loaded by a safe loader": loads_yaml_unsafely,
    "no shell": uses_a_shell,
    "no XML parser": parses_xml_with_entities,
}


def broken(text: str, rule: Callable[[ast.Call, frozenset[str]], bool]) -> list[int]:
    """Return the lines of calls that break a rule; classes of the same file derived from a safe loader are safe."""
    tree = ast.parse(text)
    classes = (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef))
    safe = frozenset(one.name for one in classes if any(name_of(base) in SAFE_LOADERS for base in one.bases))
    return [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Call) and rule(node, safe)]


def sources() -> Iterator[Path]:
    for folder in SHIPPED:
        yield from sorted((ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("rule", RULES)
def test_shipped_code_keeps_the_rule(rule: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in sources()
        for line in broken(path.read_text(encoding="utf-8"), RULES[rule])
    ]
    assert found == [], rule


@pytest.mark.parametrize(
    ("rule", "bad", "good"),
    [
        ("nothing is unpickled", "pickle.loads(x)", "pickle.dumps(x)"),
        ("nothing is unpickled", "pd.read_pickle(x)", "pd.read_parquet(x)"),
        ("torch.load has weights_only=True", "torch.load(f)", "torch.load(f, weights_only=True)"),
        ("torch.load has weights_only=True", "torch.load(f, weights_only=False)", "torch.save(f)"),
        ("numpy unpickles nothing", "np.load(f, allow_pickle=True)", "np.load(f, allow_pickle=False)"),
        ("no eval, exec, compile", "eval(x)", "model.eval()"),
        ("no eval, exec, compile", "exec(x)", "re.compile(x)"),
        ("YAML is loaded by a safe loader", "yaml.load(x)", "yaml.safe_load(x)"),
        ("YAML is loaded by a safe loader", "yaml.load(x, yaml.Loader)", "yaml.load(x, yaml.SafeLoader)"),
        (
            "YAML is loaded by a safe loader",
            "class L(yaml.Loader): pass\nyaml.load(x, Loader=L)",
            "class L(yaml.SafeLoader): pass\nyaml.load(x, Loader=L)",
        ),
        ("no shell", "subprocess.run(x, shell=True)", "subprocess.run(x)"),
        ("no shell", "os.system(x)", "os.execvpe(x)"),
        ("no XML parser", "ET.parse(x)", "parse(x)"),
    ],
)
def test_a_rule_sees_what_breaks_it(rule: str, bad: str, good: str) -> None:
    assert broken(bad, RULES[rule])
    assert broken(good, RULES[rule]) == []


def test_numpy_files_are_opened_with_pickles_refused_by_name() -> None:
    """`allow_pickle` is False by default; a reader of foreign files says so, for a default is easily overlooked."""
    calls = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in sources()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and name_of(node.func) in {"np.load", "numpy.load"}
        and keyword(node, "allow_pickle") is not False
    ]  # fmt: skip
    assert calls == []
