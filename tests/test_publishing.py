"""An export's model card, and its way to a server that speaks as much of the Hub's protocol as an upload needs."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from huggingface_hub import ModelCard
from stage2_runs import make_recipe, run_alone

from shared.cache import CacheReader
from shared.errors import CheckpointError, HubError, RecipeError
from stage2_student.__main__ import commands
from stage2_student.publishing.card import model_card
from stage2_student.publishing.push import plan_push
from stage2_student.runs.run_folder import RunFolder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, distillation_tree: dict[str, Any]) -> Path:
    """Two steps, a checkpoint and an export after each of them."""
    settings = {"name": "run", "root": str(tmp_path_factory.mktemp("runs")), "num_workers": 0}
    settings |= {"checkpoint_every": 1, "validate_every": 1}
    answers = {"max_examples": 2, "max_new_tokens": 2}
    tree = distillation_tree | {"run": settings, "evaluation": answers}
    recipe = make_recipe(tree, optimization__max_steps=2)
    assert run_alone(recipe) == 0
    return recipe.run.path


def command(*arguments: object) -> Result:
    return CliRunner().invoke(commands, [str(one) for one in arguments], standalone_mode=False)


def scores(folder: Path) -> str:
    return re.split(r"<!-- scores: \w+ -->", (folder / "README.md").read_text())[1]


# --- the card -----------------------------------------------------------------------------------------------


def test_the_card_says_what_is_on_record(run: Path, teacher_cache: Path, vqa_folder: Path) -> None:
    text = (run / "export" / "README.md").read_text()
    card = ModelCard(text)
    assert card.data.pipeline_tag == "image-text-to-text"
    assert card.data.library_name == "transformers"
    assert card.data.tags == ["knowledge-distillation", "teachonce"]
    assert card.data.license is None
    assert card.data.base_model is None  # a folder of this machine is no model of the Hub
    assert card.data.datasets is None
    manifest = CacheReader(str(teacher_cache)).manifest
    teacher = manifest.identity.teacher
    for fact in (
        manifest.sha256,
        teacher.weights_fingerprint,
        "kind threshold, tau 0.001953125",
        str(vqa_folder),
    ):
        assert fact in text
    (recipe,) = re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)
    assert yaml.safe_load(recipe) == yaml.safe_load((run / "recipe.yaml").read_text())
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    without_pictures = code.replace(", AutoProcessor", "").partition("processor =")[0]
    exec(without_pictures.replace("FOLDER_OR_REPOSITORY", str(run / "export")), {})


def test_names_of_the_hub_are_named_in_its_fields(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run" / "sources.json"
    sources = json.loads(path.read_text())
    sources["student"] |= {"model": "owner/base", "is_local": False}
    sources["data"] = {"source": "owner/data", "is_local": False}
    path.write_text(json.dumps(sources))
    (tmp_path / "run" / "hashes.json").unlink()
    assert command("export", tmp_path / "run").return_value == 0
    card = ModelCard((tmp_path / "run" / "export" / "README.md").read_text())
    assert (card.data.base_model, card.data.datasets) == ("owner/base", ["owner/data"])


def test_what_else_teaches_is_told(run: Path) -> None:
    facts = json.loads((run / "export" / "teachonce.json").read_text())
    facts["recipe"]["data"]["written"] = ["runs/mine-rounds/round-1/answers"]
    facts["recipe"]["loss"] |= {
        "reverse_kl": 0.5,
        "own_kd_ratio": 1.0,
        "positions": {"keep": 0.2, "by": "kl"},
    }
    text = model_card(facts, RunFolder(run), is_adapter=False)
    assert "| written answers | `runs/mine-rounds/round-1/answers`: of the rows" in text
    assert "own_kd_ratio 1, reverse_kl 0.5, positions (keep 0.2, by kl)" in text
    assert "one question" not in text  # rows may be conversations


def test_scores_come_at_the_end_of_the_run_and_with_each_evaluation(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    here = tmp_path / "run"
    results = json.loads((here / "results.json").read_text())
    assert f"| CE | {results['before']['ce_loss']:.4f} | {results['after']['ce_loss']:.4f} |" in scores(
        here / "export"
    )
    assert "| student | 2 | " in scores(here / "export")
    readme = here / "export" / "README.md"
    readme.write_text(readme.read_text().replace("# license: left open", "license: mit\n# "))
    assert command("evaluate", here, "--examples", 3, "--no-references").exception is None
    assert "| student | 3 | " in scores(here / "export")
    assert ModelCard(readme.read_text()).data.license == "mit"  # what people wrote stays
    readme.write_text("all mine")
    assert command("evaluate", here, "--examples", 2, "--no-references").exception is None
    assert readme.read_text() == "all mine"


def test_scores_of_another_step_are_not_this_ones(run: Path, tmp_path: Path) -> None:
    assert command("export", run, "--step", 1, "--out", tmp_path / "first").return_value == 0
    assert scores(tmp_path / "first").strip().startswith("None yet")
    assert command("export", run, "--step", 2, "--out", tmp_path / "last").return_value == 0
    assert scores(tmp_path / "last") == scores(run / "export")


# --- looking before sending -----------------------------------------------------------------------------------


def test_a_dry_run_lists_what_would_be_sent(run: Path) -> None:
    shown = command("push", run, "owner/student", "--private", "--revision", "trial", "--dry-run")
    assert shown.return_value == 0, shown.output
    assert "owner/student, revision trial (private)" in shown.output
    for path in (run / "export").iterdir():
        assert re.search(rf"{re.escape(path.name)} +{path.stat().st_size:,} bytes", shown.output)
    assert "nothing was sent" in shown.output


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda export: (export / "model.safetensors").unlink(),
            CheckpointError,
            "model.safetensors is missing",
        ),
        (lambda export: (export / "config.json").write_text("{}"), CheckpointError, "config.json changed"),
        (lambda export: (export / "README.md").unlink(), CheckpointError, "README.md is missing"),
        (lambda export: (export / "patients.csv").touch(), RecipeError, "'patients.csv' is no part"),
        (lambda export: (export / "notes").mkdir(), RecipeError, "'notes' is no part"),
        (lambda export: (export / "teachonce.json").write_text("{}"), CheckpointError, "does not list"),
        (lambda export: shutil.rmtree(export), RecipeError, "no export there"),
    ],
)
def test_what_is_not_whole_or_not_ours_is_refused(
    run: Path, tmp_path: Path, change: Any, error: type, message: str
) -> None:
    shutil.copytree(run / "export", tmp_path / "run" / "export")
    change(tmp_path / "run" / "export")
    found = command("push", tmp_path / "run", "owner/student", "--dry-run").exception
    assert isinstance(found, error)
    assert message in str(found)


def test_a_licence_may_be_added_and_the_card_edited(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "export", tmp_path / "export")
    (tmp_path / "export" / "LICENSE").write_text("MIT")
    (tmp_path / "export" / "README.md").write_text("mine")
    shown = command("push", tmp_path / "export", "owner/student", "--dry-run")
    assert shown.return_value == 0, shown.output
    assert "LICENSE" in shown.output


def test_no_name_and_no_token(run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert isinstance(command("push", run, "a/b/c", "--dry-run").exception, RecipeError)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    found = command("push", run, "owner/student").exception
    assert isinstance(found, HubError)
    assert "HF_TOKEN" in str(found)


NO_BRANCHES = (
    "../x .. a..b /x x/ a//b -x .x a/.x x. a.lock a.lock/b x~1 x^ x:y x? x* [x x\\y x@{1} @ HEAD refs/pr/1"
)


@pytest.mark.parametrize("branch", ["", " ", "a b", "x\n", *NO_BRANCHES.split()])
def test_no_name_of_a_branch(run: Path, branch: str) -> None:
    """The Hub would refuse it after the repository was made; as \"\" it would be told as main."""
    found = command("push", run, "owner/student", f"--revision={branch}", "--dry-run").exception
    assert isinstance(found, RecipeError), branch
    assert "no name of a branch" in str(found)


@pytest.mark.parametrize("branch", ["main", "v1.0", "a/b-c_d", "step@2", "caf\u00e9"])
def test_names_of_branches(run: Path, branch: str) -> None:
    assert plan_push(run, "owner/student", revision=branch).revision == branch


def test_a_file_is_no_run_and_no_export(run: Path) -> None:
    found = command("push", run / "results.json", "owner/student", "--dry-run").exception
    assert isinstance(found, RecipeError)
    assert "results.json: no folder. Give the folder of a run, or of an export" in str(found)


# --- sending ----------------------------------------------------------------------------------------------------


class Hub(ThreadingHTTPServer):
    """Repositories as an upload sees them; ``token`` is the only one that may write."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Requests)
        self.token = "hf_right"
        self.private: dict[str, bool] = {}
        self.branches: dict[str, dict[str, bytes]] = {}
        self.objects: dict[str, bytes] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Requests(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        name = self.path.removeprefix("/api/models/").partition("?")[0]
        if self.path.startswith("/api/whoami"):
            self.answer({"name": "owner", "type": "user", "orgs": []})
        elif name in self.server.private:
            self.answer(
                {
                    "id": name,
                    "private": self.server.private[name],
                    "sha": "0" * 40,
                    "siblings": [],
                    "tags": [],
                }
            )
        else:
            self.answer({"error": "Not found"}, status=404)

    def do_HEAD(self) -> None:
        self.answer({}, status=404)

    def do_PUT(self) -> None:
        self.server.objects[self.path.rpartition("/")[2]] = self.body()
        self.answer({})

    def do_POST(self) -> None:
        body, path = self.body(), self.path.partition("?")[0]
        if self.headers.get("Authorization") != f"Bearer {self.server.token}":
            self.answer({"error": "You may not write here"}, status=403)
        elif path == "/api/repos/create":
            self.create(json.loads(body))
        elif path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "/branch/" in path:
            self.server.branches.setdefault(path.rpartition("/")[2], {})
            self.answer({})
        elif "/preupload/" in path:
            files = json.loads(body)["files"]
            modes = [
                {"path": one["path"], "shouldIgnore": False, "uploadMode": self.mode(one["path"])}
                for one in files
            ]
            self.answer({"files": modes})
        elif path.endswith("/info/lfs/objects/batch"):
            asked = json.loads(body)["objects"]
            actions = [
                {**one, "actions": {"upload": {"href": f"{self.server.url}/lfs/{one['oid']}"}}}
                for one in asked
            ]
            self.answer({"transfer": "basic", "objects": actions})
        elif "/commit/" in path:
            self.commit(path.rpartition("/")[2], body)
        else:
            self.answer({"error": path}, status=404)

    def create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted.get('organization', 'owner')}/{wanted['name']}"
        status = 409 if name in self.server.private else 200
        private = wanted.get("private") or wanted.get("visibility") == "private"
        self.server.private.setdefault(name, bool(private))
        self.answer({"url": f"{self.server.url}/{name}", "name": name, "id": name}, status=status)

    def commit(self, branch: str, body: bytes) -> None:
        files = self.server.branches.setdefault(branch, {})
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
        self.answer(
            {
                "commitUrl": f"{self.server.url}/owner/student/commit/{'1' * 40}",
                "commitOid": "1" * 40,
                "success": True,
            }
        )

    @staticmethod
    def mode(path: str) -> str:
        return "lfs" if path.endswith(".safetensors") else "regular"

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def answer(self, tree: Any, status: int = 200) -> None:
        data = json.dumps(tree).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def online(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The client talks to the server; it reads its environment when it is imported, so that comes too late."""
    for name, value in {"ENDPOINT": hub.url, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    monkeypatch.setenv("HF_TOKEN", hub.token)
    return hub


def test_every_byte_arrives(run: Path, online: Hub) -> None:
    done = command("push", run, "owner/student", "--private", "--revision", "trial")
    assert done.return_value == 0, done.exception
    assert f"{online.url}/owner/student/commit/" in done.stdout.splitlines()[-1]
    assert online.private == {"owner/student": True}
    sent = {path.name: path.read_bytes() for path in (run / "export").iterdir()}
    assert online.branches == {"trial": sent}
    weights = sent["model.safetensors"]
    assert online.objects == {hashlib.sha256(weights).hexdigest(): weights}


def test_a_public_repository_stays_without_what_was_to_be_private(run: Path, online: Hub) -> None:
    online.private["owner/open"] = False
    found = command("push", run, "owner/open", "--private").exception
    assert isinstance(found, HubError)
    assert "exists and is public" in str(found)
    assert online.branches == {}
    assert command("push", run, "owner/open").return_value == 0
    assert set(online.branches) == {"main"}


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("ENDPOINT", "http://127.0.0.1:9", "cannot be reached"),
        ("HF_HUB_OFFLINE", True, "HF_HUB_OFFLINE is set"),
    ],
)
def test_no_network(
    run: Path, online: Hub, monkeypatch: pytest.MonkeyPatch, setting: str, value: Any, message: str
) -> None:
    monkeypatch.setattr(f"huggingface_hub.constants.{setting}", value)
    found = command("push", run, "owner/student").exception
    assert isinstance(found, HubError)
    assert message in str(found)


@pytest.mark.slow
def test_a_refusal_is_one_message_with_a_status(run: Path, hub: Hub) -> None:
    """As the command is called, with the client's own variables."""
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    environment |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_wrong"}
    words = [sys.executable, "-m", "stage2_student", "push", str(run), "owner/student"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == HubError.exit_status, done.stderr
    (message,) = done.stderr.splitlines()
    assert message.startswith(f"error: owner/student: {hub.url} answered 403 (You may not write here)")
    assert hub.branches == {}
