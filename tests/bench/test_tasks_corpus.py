"""The corpus: splits that never meet, the same on every machine."""

from tamis.bench.tasks import corpus


def test_the_splits_are_disjoint_and_together_the_whole_library():
    train, held = corpus.files_of("train"), corpus.files_of("held_out")
    names, held_names = {file.name for file in train}, {file.name for file in held}
    assert not names & held_names
    assert names | held_names == {file.name for file in corpus.standard_library()}
    assert 0.02 < len(held) / len(train) < 0.15
    assert not {file.text for file in train} & {file.text for file in held}


def test_the_split_depends_on_the_path_alone(tmp_path):
    for name in ("json/decoder.py", "ast.py", "test/test_ast.py", "site-packages/x.py"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"# {name}\r\nx = 1")
    files = list(corpus.standard_library(tmp_path))
    assert [file.name for file in files] == ["ast.py", "json/decoder.py"]
    assert files[0].text == "# ast.py\nx = 1\n"
    library = {file.name for file in corpus.files_of("held_out")}
    for file in files:
        assert (corpus.split_of(file.name) == "held_out") == (file.name in library)


def test_the_fingerprint_changes_with_any_file():
    files = corpus.files_of("held_out")[:3]
    changed = [*files[:2], corpus.SourceFile(files[2].name, files[2].text + "#")]
    assert corpus.fingerprint(files) == corpus.fingerprint(list(files))
    assert corpus.fingerprint(files) != corpus.fingerprint(changed)
    assert corpus.fingerprint(files) != corpus.fingerprint(files[:2])


def test_haystack_lines_are_held_out_text():
    lines = corpus.haystack_lines()
    assert "".join(lines) == "".join(file.text for file in corpus.files_of("held_out"))
    assert all(line.endswith("\n") and "\n" not in line[:-1] for line in lines)
