"""The random lineages of test_oracle.py, the world that they live in, and what a brute-force model knows of it.

The model remembers everything that was ever built together with all of its inputs in full, and compares contents: it
knows no fingerprints.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st

from finetune_assets.data import snapshot
from finetune_assets.lineage.graph import NODES
from finetune_assets.lineage.materialise import Step
from finetune_assets.lineage.node import Node, Upstream
from finetune_assets.recipe import Recipe
from finetune_assets.recipe.file import load_recipe
from finetune_assets.store.artifact import Made
from tests.conftest import MiniProject

# Keys of the recipe that may be varied freely, the default first.
KEYS: dict[str, tuple[Any, ...]] = {
    "dataset.dataset": (["facts"], ["facts", "more"], ["more"]),  # has no default: always written
    "dataset.seed": (42, 1, 2),
    "dataset.max_samples": (None, 5),
    "model.default_system": (None, "Be brief.", "Be kind."),
    "train.lora_rank": (8, 4, 16),
    "train.use_dora": (False, True),
    "train.learning_rate": (5e-5, 1e-4),
    "evaluate.max_new_tokens": (128, 4),
    "gguf.types": (["f16", "q8_0"], ["q8_0"]),
    "ollama.num_ctx": (2048, 512, 64),
}
SWITCH = "gguf.types"  # decides which part is read by those that choose
PARTS = ("a", "b")
WAYS = ("whole", "a", "b", "both", "chosen")  # what a node reads of an upstream
RAW, BASE = "raw_dataset", "base_model"  # the two names that have files behind them
FILED = {name: NODES[name] for name in (RAW, BASE)}
LOOKS = "looks.txt"


@dataclass(frozen=True)
class Asset:
    """One random node: what it reads, and the constants of the pure function that is its body."""

    name: str
    reads: tuple[str, ...]
    upstreams: tuple[tuple[str, str], ...]  # name, one of WAYS
    lossy: tuple[int, int]  # each part is the sum of everything read, divided by this


@st.composite
def lineages(draw: st.DrawFn) -> tuple[Asset, ...]:
    size = draw(st.integers(1, 8))
    names = [f"asset_{number}" for number in range(size)]
    names[0] = draw(st.sampled_from([RAW, BASE, names[0]]))
    if size > 1:
        names[1] = draw(st.sampled_from([name for name in (RAW, BASE, names[1]) if name != names[0]]))
    reads = st.sampled_from([*(key for key in KEYS if key != "dataset.dataset"), "train", "dataset"])
    assets: list[Asset] = []
    for name in names:
        before = [asset.name for asset in assets if name not in (RAW, BASE)]
        few = (
            st.lists(st.sampled_from(before), unique=True, min_size=len(assets) > 1, max_size=3)
            if before
            else st.just([])
        )
        chosen = draw(few)
        ways = [draw(st.sampled_from(WAYS if up not in (RAW, BASE) else ("whole",))) for up in chosen]
        own = draw(st.lists(reads, unique=True, max_size=3))
        assets.append(
            Asset(
                name,
                (*own, *(["dataset.dataset"] if name == RAW and "dataset" not in own else [])),
                tuple(zip(chosen, ways, strict=True)),
                draw(st.tuples(st.sampled_from([1, 3, 7]), st.sampled_from([1, 3, 7]))),
            )
        )
    return tuple(assets)


# What happens to a project, by kind. Things are named by number, to be taken modulo what is there.
NUMBER = st.integers(0, 7)
VERSION = st.sampled_from(["1", "2"])
KINDS: dict[str, tuple[st.SearchStrategy[Any], ...]] = {
    "run": (st.one_of(st.none(), st.frozensets(NUMBER, min_size=1)),),  # everything, or a selection
    "set": (NUMBER, NUMBER),
    "spell": (st.booleans(),),
    "rows": (st.sampled_from(["facts", "more"]), st.integers(0, 2)),
    "base": (st.integers(0, 2),),
    "touch": (),
    "harm": (NUMBER, NUMBER, NUMBER, st.sampled_from(["unlink", "cut", "flip"])),
    "forget": (NUMBER, NUMBER, st.booleans()),
    "code": (NUMBER, VERSION),
    "tool": (NUMBER, VERSION),
}
OFTEN = (*("run",) * 8, *("set",) * 6, *("harm",) * 2, *("rows",) * 2)
Edit = tuple[Any, ...]
SESSIONS: st.SearchStrategy[list[Edit]] = st.lists(
    st.sampled_from((*OFTEN, *KINDS)).flatmap(lambda kind: st.tuples(st.just(kind), *KINDS[kind])),
    min_size=6,
    max_size=20,
)


@dataclass
class Record:
    """Something that was built: all that went in, all that came out, and where it lies."""

    inputs: Mapping[str, Any]
    content: Mapping[str, str]
    path: Path = Path()
    whole: bool = True


@dataclass
class World:
    """A project, its random lineage, and the oracle's own account of both."""

    project: MiniProject
    assets: tuple[Asset, ...]
    values: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KEYS, 0))  # key -> which of its values
    spelled: bool = False  # are defaults written out?
    files: dict[str, str] = field(default_factory=dict)  # what lies outside, by name
    code: dict[str, str] = field(default_factory=dict)
    tool: dict[str, str] = field(default_factory=dict)
    built: dict[str, list[Record]] = field(default_factory=dict)
    current: dict[str, Record] = field(default_factory=dict)
    executed: list[str] = field(default_factory=list)
    clock: Iterator[int] = field(default_factory=lambda: count(1_600_000_000))

    @classmethod
    def begin(cls, project: MiniProject, assets: tuple[Asset, ...]) -> World:
        names = [asset.name for asset in assets]
        world = cls(project, assets, code=dict.fromkeys(names, "1"), tool=dict.fromkeys(names, "1"))
        world.built = {name: [] for name in names}
        project.empty_base()
        registry = {name: {"file_name": f"{name}.json"} for name in ("facts", "more")}
        (project.root / "data" / "dataset_info.json").write_text(json.dumps(registry))
        for name in registry:
            world.write_data(name, 0)
        world.write_base(0)
        return world

    # --- the oracle: everything is compared in full

    def inputs_of(self, asset: Asset, upstreams: Mapping[str, Record]) -> dict[str, Any]:
        keys = [key for key in KEYS if belongs(key, asset.reads)]
        inputs: dict[str, Any] = {
            "code": (self.code[asset.name], self.tool[asset.name]),
            "values": {key: KEYS[key][self.values[key]] for key in keys},
            "files": {},
        }
        if asset.name == RAW:
            inputs["files"] = {
                name: self.files[name] for name in KEYS["dataset.dataset"][self.values["dataset.dataset"]]
            }
        if asset.name == BASE:
            inputs["files"] = {"config": self.files["config"]}
        for name, way in asset.upstreams:
            content = upstreams[name].content
            if way == "whole":
                inputs[f"from {name}"] = content
            else:
                parts = {"a": "a", "b": "b", "both": "ab", "chosen": "ab"[self.values[SWITCH]]}[way]
                inputs[f"from {name}"] = {part: content[f"{part}.txt"] for part in parts}
        return inputs

    def known(self, asset: Asset, inputs: Mapping[str, Any]) -> Record | None:
        return next((record for record in self.built[asset.name] if record.inputs == inputs), None)

    def fresh(self) -> dict[str, Record]:
        """What is up to date: built of what is there now, whole, and so is everything that it reads."""
        found: dict[str, Record] = {}
        for asset in self.assets:
            if all(name in found for name, _ in asset.upstreams):
                record = self.known(asset, self.inputs_of(asset, found))
                if record is not None and record.whole:
                    found[asset.name] = record
        return found

    def step(self, asset: Asset) -> tuple[bool, Record | None]:
        """Must the body run, and what comes of it: the record, or None when an input is not to be had."""
        fresh = self.fresh()
        upstreams: dict[str, Record] = {}
        for name, _ in asset.upstreams:
            record = fresh.get(name) or self.current.get(name)
            if record is None or not record.whole or record not in self.built[name]:
                return False, None
            upstreams[name] = record
        if any(self.differs(record, upstreams) for record in upstreams.values()) and asset.name not in fresh:
            return False, None
        inputs = self.inputs_of(asset, upstreams)
        record = self.known(asset, inputs)
        if record is not None and record.whole:
            self.current[asset.name] = record
            return False, record
        if record is not None:
            self.built[asset.name].remove(record)  # damaged: made again in its place
        record = Record(inputs, expected(asset, inputs))
        self.built[asset.name].append(record)
        self.current[asset.name] = record
        return True, record

    def differs(self, record: Record, others: Mapping[str, Record]) -> bool:
        """Was it built of something else than one of the others holds now?"""
        for name, other in others.items():
            seen = record.inputs.get(f"from {name}", {})
            now = {part: other.content.get(f"{part}.txt" if part in PARTS else part) for part in seen}
            if seen != now or (seen and not set(seen) <= set(PARTS) and set(seen) != set(other.content)):
                return True
        return False

    def own_inputs_unchanged(self, asset: Asset) -> bool:
        """Has nothing changed of what the asset reads beside its upstreams?"""
        record = self.current[asset.name]
        now = self.inputs_of(Asset(asset.name, asset.reads, (), asset.lossy), {})
        return all(record.inputs[key] == value for key, value in now.items())

    def asset(self, number: int) -> Asset:
        return self.assets[number % len(self.assets)]

    def record(self, number: int, which: int) -> Record | None:
        records = self.built[self.asset(number).name]
        return records[which % len(records)] if records else None

    # --- what happens to the real thing

    def recipe(self) -> Recipe:
        sections: dict[str, dict[str, Any]] = {"model": {"model_name_or_path": "./base"}, "ollama": {"name": "mini"}}
        for key, index in self.values.items():
            section, _, name = key.partition(".")
            if index or self.spelled or key == "dataset.dataset":
                sections.setdefault(section, {})[name] = KEYS[key][index]
        if self.spelled:
            sections = {name: dict(reversed(values.items())) for name, values in reversed(sections.items())}
        text = yaml.safe_dump(sections, sort_keys=False)
        self.project.recipe_path().write_text(f"# in other words\n{text}" if self.spelled else text)
        return load_recipe(self.project.recipe_path())

    def write_data(self, name: str, variant: int) -> None:
        """One of three contents; all mean the same, but not in the same bytes, or not to the same effect."""
        texts = ('[{"instruction": "say 1"}]', '[ {"instruction": "say 1"} ]', '[{"instruction": "say 5"}]')
        self.files[name] = texts[variant]
        self.write(self.project.root / "data" / f"{name}.json", texts[variant])

    def write_base(self, variant: int) -> None:
        self.files["config"] = json.dumps({"hidden_size": variant})
        self.write(self.project.root / "base" / "config.json", self.files["config"])

    def write(self, path: Path, text: str) -> None:
        path.write_text(text)
        self.touch(path)

    def touch(self, path: Path) -> None:
        """As if by people: no two writes within one tick of a file system's clock."""
        moment = next(self.clock)
        os.utime(path, (moment, moment))

    def harm(self, record: Record, which: int, how: str) -> None:
        """Delete, cut or change a file of an artifact, if it has one left."""
        record.whole = False
        files = sorted(path for path in record.path.iterdir() if path.name != "manifest.json")
        for path in files[which % len(files) :][:1] if files else []:
            if how == "unlink":
                path.unlink()
            else:
                text = path.read_text()
                self.write(path, text[:-1] if how == "cut" else text[:-1] + "?")

    def body(self, asset: Asset) -> Callable[[Step], Made]:
        def build(step: Step) -> Made:
            self.executed.append(asset.name)
            if asset.name == RAW:
                snapshot.take(self.project.root / "data", step.recipe.dataset.dataset, step.staging)
            elif asset.name == BASE:
                shutil.copyfile(self.project.root / "base" / "config.json", step.staging / "config.json")
            else:
                texts = [text for up, way in asset.upstreams for text in read(step.inputs[up].path, way, step.recipe)]
                for name, text in made_of(asset, texts, values_read(asset.reads, step.recipe)).items():
                    (step.staging / name).write_text(text)
            content = sorted(path.name for path in step.staging.iterdir())
            (step.staging / LOOKS).write_text(f"{next(self.clock)}\n")  # differs each time, and nobody reads it
            return Made({}, {part: [f"{part}.txt"] for part in PARTS if f"{part}.txt" in content}, content)

        return build

    def nodes(self) -> dict[str, Node]:
        return {
            asset.name: dataclasses.replace(
                FILED.get(asset.name, Node(asset.name, ())),
                reads=asset.reads,
                upstreams=tuple(Upstream(name, parts_read(way)) for name, way in asset.upstreams),
                tools=lambda version=self.tool[asset.name]: {"compiler": version},
                code_version=self.code[asset.name],
            )
            for asset in self.assets
        }


def parts_read(way: str) -> Callable[[Recipe], tuple[str, ...]] | None:
    if way == "whole":
        return None
    if way == "chosen":
        return lambda recipe: ("a",) if recipe.served_type == "f16" else ("b",)
    return lambda _: PARTS if way == "both" else (way,)


def read(folder: Path, way: str, recipe: Recipe) -> list[str]:
    """The texts that a node reads of an upstream's folder."""
    parts = parts_read(way)
    if parts is not None:
        return [(folder / f"{part}.txt").read_text() for part in parts(recipe)]
    return [path.read_text() for path in folder.iterdir() if path.name not in (LOOKS, "manifest.json")]


def belongs(key: str, reads: Sequence[str]) -> bool:
    """Is a recipe key among what is read, by itself or with its section?"""
    return key in reads or key.partition(".")[0] in reads


def values_read(reads: Sequence[str], recipe: Recipe) -> int:
    """A number for the recipe values that a node reads."""
    found = 0
    for key, values in KEYS.items():
        section, _, name = key.partition(".")
        if belongs(key, reads):
            found += values.index(getattr(getattr(recipe, section), name))
    return found


def made_of(asset: Asset, texts: Iterable[str], values: int) -> dict[str, str]:
    """The pure function that an asset's body is: file name -> text, the same for many different inputs."""
    total = values + sum(int(number) for text in texts for number in re.findall(r"\d+", text))
    return {f"{part}.txt": str(total // divisor) for part, divisor in zip(PARTS, asset.lossy, strict=True)}


def expected(asset: Asset, inputs: Mapping[str, Any]) -> dict[str, str]:
    """What an asset holds when it is built of these inputs."""
    if asset.name == BASE:
        return {"config.json": inputs["files"]["config"]}
    if asset.name == RAW:
        copies = {name: f"{index:02d}-{name}.json" for index, name in enumerate(inputs["files"])}
        registry = json.dumps({name: {"file_name": copy} for name, copy in copies.items()}, indent=2) + "\n"
        return {"dataset_info.json": registry, **{copy: inputs["files"][name] for name, copy in copies.items()}}
    texts = [text for up, _ in asset.upstreams for text in inputs[f"from {up}"].values()]
    return made_of(asset, texts, sum(KEYS[key].index(value) for key, value in inputs["values"].items()))


@contextmanager
def lineage(nodes: Mapping[str, Node]) -> Iterator[None]:
    """The lineage of everybody is this one for a while."""
    before = dict(NODES)
    try:
        replace(nodes)
        yield
    finally:
        replace(before)


def replace(nodes: Mapping[str, Node]) -> None:
    NODES.clear()
    NODES.update(nodes)


def apply(world: World, edit: Edit) -> None:
    """Change the world, and the oracle's account of it."""
    name, *what = edit
    match name:
        case "set":
            read = [key for key in KEYS if any(belongs(key, asset.reads) for asset in world.assets)] or list(KEYS)
            key = read[what[0] % len(read)]
            world.values[key] = what[1] % len(KEYS[key])
        case "spell":
            world.spelled = what[0]
        case "rows":
            world.write_data(what[0], what[1])
        case "base":
            world.write_base(what[0])
        case "touch":
            for path in (world.project.root / "data").iterdir():
                world.touch(path)
        case "code" | "tool":
            versions = world.code if name == "code" else world.tool
            versions[world.asset(what[0]).name] = what[1]
            replace(world.nodes())
        case "harm":
            if (record := world.record(what[0], what[1])) is not None:
                world.harm(record, what[2], what[3])
        case "forget":
            if (record := world.record(what[0], what[1])) is not None:
                # its folder, or only the manifest that tells it from any other folder
                shutil.rmtree(record.path) if what[2] else world.write(record.path / "manifest.json", "{}")
                world.built[world.asset(what[0]).name].remove(record)
