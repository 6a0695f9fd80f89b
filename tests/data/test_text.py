import subprocess
import sys

from data.text import one_line, tokenize


def test_words_are_lower_cased_and_padded_or_cut():
    tokens = tokenize("Close the drawer!", length=5)
    assert tokens == tokenize("close  THE drawer", length=5)
    assert tokens[3:] == [0, 0]
    assert all(0 < token < 2048 for token in tokens[:3])
    assert tokenize("Close the drawer", length=2) == tokens[:2]
    assert tokenize("drawer", length=1) == tokens[2:3]


def test_a_token_is_the_same_in_every_process():
    code = "from data.text import tokenize; print(tokenize('press the handle'))"
    answers = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                              env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)}).stdout
               for seed in ("1", "2")}
    assert answers == {f"{tokenize('press the handle')}\n"}


def test_no_word_takes_the_padding_token():
    assert all(0 < token < 7 for i in range(200) for token in tokenize(f"word{i}", length=1, vocabulary=7))


def test_an_error_is_one_printable_line_without_its_path():
    assert one_line(ValueError("a \n\x1b[31mred\x00 \u202eword")) == "a [31mred word"
    assert one_line(FileNotFoundError(2, "No such file or directory", "/home/me/x")) == "No such file or directory"
    assert one_line(KeyError()) == "KeyError"
    assert len(one_line(ValueError("x" * 999))) == 160
