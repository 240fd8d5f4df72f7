"""A name leads to one folder, whoever asks: here, in a package, or on the hub."""

from pathlib import Path

import pytest

from mlx_redrafter.loading.find import DEFAULT_MODEL, find_model, model_folder


class Hub:
    """A repository of these files; remembers which were asked for."""

    def __init__(self, folder, monkeypatch, **files):
        self.folder, self.files, self.asked = folder, files, []
        monkeypatch.setattr("huggingface_hub.snapshot_download", self.download)
        monkeypatch.setattr("huggingface_hub.list_repo_files", lambda repo, revision: list(files))

    def download(self, repo, revision, allow_patterns):
        self.asked.append((repo, revision))
        for name, content in self.files.items():
            if any(Path(name).match(pattern) for pattern in allow_patterns):
                (self.folder / name).write_text(content)
        return str(self.folder)


def test_a_repository_without_an_owner(tmp_path, monkeypatch):
    hub = Hub(
        tmp_path, monkeypatch, **{"config.json": "{}", "model.safetensors": "", "flax_model.msgpack": ""}
    )
    assert model_folder("gpt2", "main") == tmp_path
    assert hub.asked == [("gpt2", "main")]
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}


def test_converting_takes_the_repository_and_not_what_a_package_has_of_it(tmp_path, monkeypatch):
    hub = Hub(tmp_path, monkeypatch, **{"config.json": "{}", "model.safetensors": ""})
    assert find_model(DEFAULT_MODEL) == tmp_path
    assert hub.asked == [(DEFAULT_MODEL, None)]


def test_the_one_gguf_file_of_a_repository_is_downloaded(tmp_path, monkeypatch):
    Hub(tmp_path, monkeypatch, **{"m.gguf": "GGUF", "README.md": ""})
    assert find_model("someone/m-gguf") == tmp_path / "m.gguf"


def test_a_gguf_file_is_left_where_there_are_safetensors(tmp_path, monkeypatch):
    Hub(tmp_path, monkeypatch, **{"config.json": "{}", "model.safetensors": "", "m.gguf": ""})
    assert find_model("someone/both") == tmp_path
    assert not (tmp_path / "m.gguf").exists()


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        (("a.gguf", "b.gguf"), "someone/m holds GGUF files: download one, such as a.gguf"),
        (("config.json", "pytorch_model.bin"), "pickle file pytorch_model.bin, which can run code"),
        (("README.md",), "holds no model"),
    ],
)
def test_what_is_not_usable_is_not_downloaded(tmp_path, monkeypatch, files, complaint):
    Hub(tmp_path, monkeypatch, **dict.fromkeys(files, "{}"))
    with pytest.raises(ValueError, match=complaint):
        find_model("someone/m")
    assert {path.name for path in tmp_path.iterdir()} <= {"config.json"}


@pytest.mark.parametrize("name", ["", "nowhere", "./no/where", "someone/nothing"])
def test_a_name_that_leads_nowhere_is_told_in_one_line(name):
    with pytest.raises(
        ValueError, match="is neither a folder nor a repository that can be downloaded"
    ) as told:
        find_model(name)
    assert "\n" not in str(told.value)


def test_other_files_are_no_models(tmp_path):
    (tmp_path / "m.txt").write_text("")
    with pytest.raises(ValueError, match="is no model: give a folder, a .gguf file or"):
        find_model(str(tmp_path / "m.txt"))
