"""Models, configs, data and manifests that somebody else has made, in order to run code here or to reach beyond."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import pickle
import shutil
import socket
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.faults.hostile_names import command, tree

PROMPT = "the plot of this drama was"
CPU = "use_cpu: true\nnum_threads: 1\n"


class Payload:
    """An object whose unpickling writes a file."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch '{self.target}'",))


@dataclass(frozen=True)
class Scene:
    """Where a case plays: a home, a working directory, a canary beside them, a file that only a payload would make."""

    folder: Path

    @property
    def home(self) -> Path:
        return self.folder / "home"

    @property
    def executed(self) -> Path:
        return self.folder / "executed"

    @property
    def work(self) -> Path:
        return self.folder / "work"

    @property
    def python(self) -> str:
        """A program that says that it ran."""
        return f"open({str(self.executed)!r}, 'w').write('x')\n"

    @property
    def pickled(self) -> bytes:
        """A pickle that says that it was read."""
        return pickle.dumps(Payload(self.executed))

    def model(self) -> Path:
        """A good model as a plain folder, as it comes from the hub."""
        target = self.work / "model"
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(self.home / "models/sft/v1", target)
        for name in ("manifest.json", "README.md"):
            (target / name).unlink(missing_ok=True)
        return target

    def write(self, name: str, content: str | bytes) -> Path:
        """A file in the working directory."""
        path = self.work / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path


Plant = Callable[[Scene], tuple[str, ...]]
CASES: dict[str, Plant] = {}


def generate(scene: Scene, model: Path) -> tuple[str, ...]:
    """The command that loads a model and its tokenizer, and samples from it."""
    scene.write("cpu.yaml", CPU)
    return ("generate", str(model), "--prompt", PROMPT, "--samples", "1", "--config", "cpu.yaml")


def case(name: str) -> Callable[[Plant], Plant]:
    """Add a case."""

    def add(plant: Plant) -> Plant:
        CASES[name] = plant
        return plant

    return add


def _beside(name: str, kind: str, *, instead: bool = False) -> None:
    """A pickle beside a model's weights, or instead of them."""

    @case(f"{'only ' if instead else ''}{name} as a {kind}")
    def plant(scene: Scene) -> tuple[str, ...]:
        model = scene.model()
        if instead:
            (model / "model.safetensors").unlink(missing_ok=True)
        if kind == "pickle":
            (model / name).write_bytes(scene.pickled)
        else:
            torch.save({"weight": Payload(scene.executed)}, model / name)
        return generate(scene, model)


for _name in (
    "pytorch_model.bin",
    "training_args.bin",
    "optimizer.pt",
    "rng_state.pth",
    "scheduler.pt",
    "tokenizer.pkl",
):
    _beside(_name, "pickle")
for _name in ("pytorch_model.bin", "model.safetensors", "adapter_model.bin", "tf_model.h5", "flax_model.msgpack"):
    _beside(_name, "pickle", instead=True)
_beside("pytorch_model.bin", "torch archive", instead=True)
_beside("model.safetensors", "torch archive", instead=True)


def _weights(name: str, content: Callable[[Scene], bytes]) -> None:
    @case(f"safetensors: {name}")
    def plant(scene: Scene) -> tuple[str, ...]:
        model = scene.model()
        (model / "model.safetensors").write_bytes(content(scene))
        return generate(scene, model)


def _header(text: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text


_ONE = b'{"x":{"dtype":"F32","shape":[%s],"data_offsets":[%s]}}'
_weights("nothing", lambda _: b"")
_weights("a header of 2^64 - 1 bytes", lambda _: b"\xff" * 8 + b"{}")
_weights("a header longer than the file", lambda _: _header(b"{}", 1 << 40))
_weights("a header of 2^63 bytes", lambda _: _header(b"{}", 1 << 63))
_weights("a header nested 100,000 deep", lambda _: _header(b'{"x":' * 100_000))
_weights("a tensor of 2^62 numbers", lambda _: _header(_ONE % (b"4611686018427387904", b"0,8")) + b"\0" * 8)
_weights("offsets beyond the file", lambda _: _header(_ONE % (b"2", b"0,999999999")) + b"\0" * 8)
_weights("offsets backwards", lambda _: _header(_ONE % (b"2", b"8,0")) + b"\0" * 8)
_weights("a type that does not exist", lambda _: _header(_ONE.replace(b"F32", b"PKL") % (b"2", b"0,8")) + b"\0" * 8)
_weights("a zip archive", lambda scene: _zip({"../../executed": b"x", "data.pkl": scene.pickled}))


@case("shards that lie elsewhere")
def _(scene: Scene) -> tuple[str, ...]:
    model = scene.model()
    (model / "model.safetensors").rename(scene.work / "outside.safetensors")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "../outside.safetensors", "x": "/etc/passwd"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    return generate(scene, model)


@case("shards that are pickles")
def _(scene: Scene) -> tuple[str, ...]:
    model = scene.model()
    (model / "model.safetensors").unlink()
    (model / "shard.bin").write_bytes(scene.pickled)
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "shard.bin"}}
    for name in ("pytorch_model.bin.index.json", "model.safetensors.index.json"):
        (model / name).write_text(json.dumps(index))
    return generate(scene, model)


def _config(name: str, change: Callable[[dict[str, Any]], None], file: str = "config.json", code: str = "") -> None:
    """A value in one of a model's JSON files, and code beside it."""

    @case(f"{file}: {name}")
    def plant(scene: Scene) -> tuple[str, ...]:
        model = scene.model()
        path = model / file
        values = json.loads(path.read_text()) if path.exists() else {}
        change(values)
        path.write_text(json.dumps(values))
        if code:
            (model / code).parent.mkdir(parents=True, exist_ok=True)
            (model / code).write_text(scene.python + "class Evil: pass\n")
            (scene.work / Path(code).name).write_text(scene.python + "def f(*a, **k): return [0.0]\n")
        return generate(scene, model)


_AUTO = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil", "AutoModel": "evil.Evil"}
_config("code for a known architecture", lambda v: v.update(auto_map=_AUTO), code="evil.py")
_config("code for an unknown architecture", lambda v: v.update(auto_map=_AUTO, model_type="evil"), code="evil.py")
_config("code of another repository", lambda v: v.update(auto_map={"AutoConfig": "a/b--evil.Evil"}, model_type="evil"))
_config("trust asked for in the file", lambda v: v.update(auto_map=_AUTO, trust_remote_code=True), code="evil.py")
_config("attention from the hub", lambda v: v.update(_attn_implementation="evil/kernel", attn_implementation="evil/k"))
_config(
    "a reward function", lambda v: v.update(reward_functions=[{"source": "evil:f"}], judge="evil:f"), code="evil.py"
)
_config("custom generation", lambda v: v.update(custom_generate="evil"), code="custom_generate/generate.py")
_config("weights of 10^12 numbers", lambda v: v.update(hidden_size=10**6, intermediate_size=10**6))
_config("no layers at all", lambda v: v.update(num_hidden_layers=-1))
_config("words for numbers", lambda v: v.update(hidden_size="__import__('os')", num_attention_heads=[1]))
_config("an architecture that is a list", lambda v: v.update(architectures={"a": 1}))
_config("another model's name", lambda v: v.update(_name_or_path="../../canary", base_model_name_or_path="evil/x"))
_config("a quantisation that does not exist", lambda v: v.update(quantization_config={"quant_method": "evil"}))
_config(
    "tokenizer code",
    lambda v: v.update(auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]}),
    "tokenizer_config.json",
    "evil.py",
)
_config(
    "a tokenizer class that does not exist",
    lambda v: v.update(tokenizer_class="Evil"),
    "tokenizer_config.json",
    "evil.py",
)
_config(
    "a vocabulary elsewhere",
    lambda v: v.update(vocab_file="/etc/passwd", tokenizer_file="/etc/passwd"),
    "tokenizer_config.json",
)
_config(
    "generation code",
    lambda v: v.update(custom_generate="evil", trust_remote_code=True),
    "generation_config.json",
    "evil.py",
)
_config(
    "an adapter of a hub model",
    lambda v: v.update(
        base_model_name_or_path="evil/base",
        peft_type="LORA",
        task_type="CAUSAL_LM",
        auto_mapping={"parent_library": "evil", "base_model_class": "Evil"},
    ),
    "adapter_config.json",
    "evil.py",
)


def _file(name: str, file: str, content: Callable[[Scene], str | bytes]) -> None:
    """One file of a model replaced."""

    @case(f"{file}: {name}")
    def plant(scene: Scene) -> tuple[str, ...]:
        model = scene.model()
        made = content(scene)
        (model / file).unlink(missing_ok=True)
        (model / file).write_bytes(made.encode() if isinstance(made, str) else made)
        return generate(scene, model)


for _name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
    _file("nested 100,000 deep", _name, lambda _: "[" * 100_000 + "]" * 100_000)
    _file("a number of 100,000 digits", _name, lambda _: '{"model_type": ' + "9" * 100_000 + "}")
_file("a list", "config.json", lambda _: "[1, 2]")
_file("a pickle", "tokenizer.json", lambda scene: scene.pickled)
_file("not UTF-8", "config.json", lambda _: b"\xff\xfe\0{")

TEMPLATES = {
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.popen('touch EXECUTED').read() }}",
    "import": "{% set x = self.__init__.__globals__.__builtins__.__import__('os').system('touch EXECUTED') %}",
    "a file": "{% include '/etc/passwd' %}",
    "an attribute by name": "{{ (messages|attr('__class__'))|attr('__base__')|attr('__subclasses__')() }}",
    "a change of the data": "{% set _ = messages.append(1) %}{% set _ = messages.clear() %}",
    "a format string": "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "a long range": "{% for i in range(99999999999) %}x{% endfor %}",
}


def _template(name: str, text: str, *, in_file: bool) -> None:
    @case(f"chat template{' in a file of its own' if in_file else ''}: {name}")
    def plant(scene: Scene) -> tuple[str, ...]:
        model = scene.model()
        template = text.replace("EXECUTED", str(scene.executed))
        if in_file:
            (model / "chat_template.jinja").write_text(template)
        else:
            path = model / "tokenizer_config.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template}))
        rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
        data = scene.write("chat.jsonl", "".join(json.dumps(row) + "\n" for row in rows * 4))
        keys = {"output_name": "x", "model_name_or_path": str(model), "dataset_name": str(data), "max_length": 10}
        scene.write("sft.yaml", json.dumps({**keys, "max_steps": 1, "use_cpu": True, "num_threads": 1}))
        return ("sft", "--config", "sft.yaml")


for _name, _text in TEMPLATES.items():
    _template(_name, _text, in_file=_name == "globals")

TAGS = (
    "!!python/object/apply:os.system ['touch EXECUTED']",
    "!!python/object/new:os.system ['touch EXECUTED']",
    "!!python/object/apply:subprocess.Popen [['touch', 'EXECUTED']]",
    "!!python/name:os.system",
    "!!python/module:os",
    "!!python/object:evil.Evil {}",
    "!!python/tuple [1]",
    "!evil x",
)
for _tag in TAGS:

    @case(f"YAML: {_tag}")
    def _(scene: Scene, tag: str = _tag) -> tuple[str, ...]:
        scene.write("evil.py", scene.python)
        scene.write("dpo.yaml", f"output_name: x\nbeta: {tag}\n".replace("EXECUTED", str(scene.executed)))
        return ("dpo", "--config", "dpo.yaml")


@case("YAML tag as an override")
def _(scene: Scene) -> tuple[str, ...]:
    return ("dpo", "output_name=x", f"beta=!!python/object/apply:os.system ['touch {scene.executed}']")


def _zip(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def _tar(members: dict[str, bytes], scene: Scene) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, str(scene.folder)
        archive.addfile(link)
    return buffer.getvalue()


def _data(name: str, file: str, content: Callable[[Scene], str | bytes]) -> None:
    @case(f"data: {name}")
    def plant(scene: Scene) -> tuple[str, ...]:
        return ("data", "check", str(scene.write(file, content(scene))))


_CLIMB = {"../../executed": b"x", "/tmp/executed-by-rlhf": b"x", "a/../../executed": b"x"}
_data("a zip file that climbs", "data.zip", lambda _: _zip(_CLIMB))
_data("a zip file that climbs, as JSON", "data.json", lambda _: _zip(_CLIMB))
_data("a tar file that climbs", "data.tar.gz", lambda scene: _tar(_CLIMB, scene))
_data("a tar file that climbs, as JSONL", "data.jsonl.gz", lambda scene: _tar(_CLIMB, scene))
_data("a pickle", "data.pkl", lambda scene: scene.pickled)
_data("a pickle as Parquet", "data.parquet", lambda scene: scene.pickled)
_data("a pickle as JSONL", "data.jsonl", lambda scene: scene.pickled)
_data("a script", "data.py", lambda scene: scene.python)
_data(
    "Parquet with a made-up footer",
    "data2.parquet",
    lambda _: b"PAR1" + b"\xff" * 64 + struct.pack("<I", 1 << 31) + b"PAR1",
)
_data("JSON nested 100,000 deep", "deep.jsonl", lambda _: "[" * 100_000 + "\n")
_data("JSON with a number of 100,000 digits", "long.jsonl", lambda _: '{"prompt": ' + "9" * 100_000 + "}\n")
_data("gzip of 100 MB of zeros", "zeros.jsonl.gz", lambda _: gzip.compress(b"\0" * (100 << 20), 1))


@case("data: a folder with a script of its name")
def _(scene: Scene) -> tuple[str, ...]:
    for name in ("pairs.py", "__init__.py", "dataset.py"):
        scene.write(f"pairs/{name}", scene.python)
    scene.write("pairs/dataset_infos.json", "{}")
    return ("data", "check", "pairs")


@case("data: a script beside a hub id")
def _(scene: Scene) -> tuple[str, ...]:
    scene.write("evil_data/evil_data.py", scene.python)
    return ("data", "check", "evil_data")


@case("data: a saved folder whose files lie elsewhere")
def _(scene: Scene) -> tuple[str, ...]:
    scene.write(
        "saved/state.json",
        json.dumps(
            {
                "_data_files": [{"filename": "../../canary/bird"}],
                "_fingerprint": "x",
                "_format_type": None,
                "_format_columns": None,
                "_format_kwargs": {},
                "_output_all_columns": False,
                "_split": None,
            }
        ),
    )
    scene.write("saved/dataset_info.json", "{}")
    return ("data", "check", "saved")


@case("data: a saved folder with Arrow garbage")
def _(scene: Scene) -> tuple[str, ...]:
    scene.write(
        "saved/state.json",
        json.dumps(
            {
                "_data_files": [{"filename": "data.arrow"}],
                "_fingerprint": "x",
                "_format_type": None,
                "_format_columns": None,
                "_format_kwargs": {},
                "_output_all_columns": False,
                "_split": None,
            }
        ),
    )
    scene.write("saved/dataset_info.json", "{}")
    scene.write("saved/data.arrow", b"ARROW1\0\0" + scene.pickled)
    return ("data", "check", "saved")


@case("data: a saved folder with pictures at an address")
def _(scene: Scene) -> tuple[str, ...]:
    from datasets import Dataset, Features, Value

    rows = {"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]}
    kinds = {**dict.fromkeys(rows, Value("string")), "picture": {"bytes": Value("binary"), "path": Value("string")}}
    rows["picture"] = [{"bytes": None, "path": "http://127.0.0.1:9/x"}]
    Dataset.from_dict(rows, features=Features(kinds)).save_to_disk(str(scene.work / "pictures"))
    path = scene.work / "pictures/dataset_info.json"
    about = json.loads(path.read_text())
    about["features"]["picture"] = {"_type": "Image"}
    path.write_text(json.dumps(about))
    return ("data", "check", "pictures")


def _manifest(name: str, change: dict[str, Any], *words: str) -> None:
    """A downloaded model whose manifest.json says something."""

    @case(f"manifest of a folder: {name}")
    def plant(scene: Scene) -> tuple[str, ...]:
        model = scene.model()
        values = json.loads((scene.home / "models/sft/v1/manifest.json").read_text())
        for key in ("format", "manifest_sha256"):
            values.pop(key, None)
        values["files"].pop("README.md", None)
        values.update({key: value for key, value in change.items() if key != "config"})
        values["config"].update(change.get("config", {}))
        (model / "manifest.json").write_text(json.dumps(values))
        scene.write("evil.py", scene.python + "def f(*a, **k): return [0.0]\n")
        scene.write("cpu.yaml", CPU)
        return tuple(word.replace("MODEL", str(model)) for word in words)


_EVALUATE = ("evaluate", "MODEL", "--samples", "2", "--max-prompts", "2", "--config", "cpu.yaml")
_REMOTE = {"dataset_name": "evil/data", "trust_remote_code": True, "attn_implementation": "evil/kernel"}
_manifest("data on the hub", {"config": _REMOTE}, *_EVALUATE)
_manifest(
    "a reference on the hub",
    {"stage": "ppo", "parents": {"reference": {"ref": "evil/model", "digest": None}}},
    *_EVALUATE,
)
_manifest(
    "a reward function",
    {
        "stage": "ppo",
        "config": {
            "reward_functions": [{"source": "evil:f", "weight": 1.0}],
            "judge": "evil:f",
            "true_reward": "evil:f",
        },
        "parents": {},
    },
    "exact",
    "MODEL",
)
_manifest(
    "a reward function, compared",
    {"stage": "ppo", "config": {"reward_functions": [{"source": "evil:f"}], "reward_model_path": "evil:f"}},
    "compare",
    "MODEL",
    "--baseline",
    "sft",
    "--samples",
    "2",
    "--max-prompts",
    "2",
    "--config",
    "cpu.yaml",
)
_manifest(
    "parents that are folders",
    {"parents": {"base": {"ref": "/etc", "digest": "x"}, "reference": {"ref": "../../canary", "digest": None}}},
    "models",
    "lineage",
    "MODEL",
)
_manifest("lengths that are code", {"config": {"max_length": "__import__('os')", "response_length": [1]}}, *_EVALUATE)
_manifest(
    "text for a terminal",
    {"stage": "\x1b[2J", "created": "\x9b31m", "parents": {"\x1b]0;x\x07": {"ref": "\u202ex"}}},
    "models",
    "show",
    "MODEL",
)
_manifest("files elsewhere", {"files": {"../../canary/bird": {"size": 5, "sha256": "0" * 64}}}, *_EVALUATE)
_manifest(
    "a fault in every file", {"files": {"config.json": {"size": 1, "sha256": "0" * 64}}}, "models", "verify", "MODEL"
)


@case("a version with a link out of its folder")
def _(scene: Scene) -> tuple[str, ...]:
    version = scene.home / "models/sft/v1"
    (version / "additional_chat_templates").symlink_to(scene.folder / "canary")
    return ("models", "verify", "sft")


@case("a model folder with links out of it")
def _(scene: Scene) -> tuple[str, ...]:
    model = scene.model()
    (model / "chat_template.jinja").symlink_to("/etc/passwd")
    (model / "additional_chat_templates").symlink_to(scene.folder / "canary")
    (model / "generation_config.json").unlink(missing_ok=True)
    (model / "generation_config.json").symlink_to(scene.folder / "canary/bird")
    return generate(scene, model)


@case("a reward function that is a model's name")
def _(scene: Scene) -> tuple[str, ...]:
    scene.write("evil.py", scene.python)
    return ("generate", "evil:f", "--prompt", PROMPT)


@case("a results.json that is hostile")
def _(scene: Scene) -> tuple[str, ...]:
    folder = scene.home / "reports/evil"
    folder.mkdir(parents=True)
    text = '</title><script>alert(1)</script>=HYPERLINK("http://x")\x1b[2J'
    values = {
        "name": text,
        "baseline": text,
        "rows": [],
        "command": text,
        "data": [{"source": text}],
        "configs": {text: text},
    }
    (folder / "results.json").write_text(json.dumps(values))
    return ("report", "evil")


def make_scene(home: Path, folder: Path) -> Scene:
    """A scene whose home is a copy of one with sft@v1."""
    folder.mkdir(parents=True)
    shutil.copytree(home, folder / "home", ignore=shutil.ignore_patterns("runs", "cache"))
    for name in ("work", "house", "canary"):
        (folder / name).mkdir()
    (folder / "canary" / "bird").write_text("sings")
    return Scene(folder)


@contextlib.contextmanager
def no_network() -> Iterator[list[str]]:
    """Refuse every connection to another machine; yields the addresses that were asked for."""
    asked: list[str] = []
    connect, connect_ex, look_up = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo

    def refuse(self: socket.socket, address: Any, *rest: Any) -> None:
        if self.family == getattr(socket, "AF_UNIX", None):
            return connect(self, address, *rest)
        asked.append(str(address))
        raise OSError(101, "Network is unreachable")

    def refuse_name(host: Any, *rest: Any, **options: Any) -> None:
        asked.append(str(host))
        raise socket.gaierror(-2, "Name or service not known")

    socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo = refuse, refuse, refuse_name
    try:
        yield asked
    finally:
        socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo = connect, connect_ex, look_up


def play(scene: Scene, words: Sequence[str]) -> tuple[int, str, list[str]]:
    """Run the words of a case here; returns the exit code, what was said, and who was asked for in the network."""
    with no_network() as asked:
        code, said = command(scene.folder, *words)
    return code, said, asked


def attempt(name: str, scene: Scene, run: Callable[..., tuple[int, str, list[str]]] = play) -> list[str]:
    """Play one case; returns what went wrong: run, reached, damaged, asked of the network, or said badly."""
    words = CASES[name](scene)
    fixed = (scene.folder / "canary", scene.home / "models", scene.home / "data")
    before = tree(*fixed)
    code, said, asked = run(scene, words)
    failed = []
    if scene.executed.exists() or Path("/tmp/executed-by-rlhf").exists():
        failed.append("a payload ran or a member was written outside")
    after = tree(*fixed)
    made = {path for path in after if path not in before and "/home/models/x" not in path}
    if made or any(after.get(path) != state for path, state in before.items()):
        failed.append(f"something was touched: {sorted(made)}")
    if asked:
        failed.append(f"asked for {asked}")
    if code not in (0, 2) or "Traceback" in said or "unexpected" in said or "\x1b" in said or "\x9b" in said:
        failed.append(f"exit {code}: {said[-1500:]}")
    return [f"{name}: {failure}" for failure in failed]


def hostile_files(home: Path, folder: Path) -> dict[str, Any]:
    """Play every case in a scene of its own; returns how many there are and what failed."""
    failed = []
    for number, name in enumerate(CASES):
        scene = make_scene(home, folder / str(number))
        failed += attempt(name, scene)
        shutil.rmtree(scene.folder)
    return {"cases": len(CASES), "failed": failed, "ok": not failed}
