"""Writers: a local model's texts, a server's, and the record that a killed run goes on from."""

import json

import pytest
import torch
from chat_server import says

from lifecycle_hf.completions.server import ChatServer
from lifecycle_hf.synthesis import Cut, LocalWriter, Recorded, ServerWriter

OPTIONS = {"max_tokens": 6, "temperature": 1.0, "seed": 3}


def chats(*texts):
    return [[{"role": "user", "content": text}] for text in texts]


def shouts(chats, *, max_tokens, temperature, seed, stop=()):
    return [f"{chat[-1]['content'].upper()} {seed}" for chat in chats]


def test_a_model_writes_the_same_text_again_and_counts_tokens(tiny_llama):
    make_model, tokenizer = tiny_llama
    writer = LocalWriter(make_model(), tokenizer, batch_size=2)
    asked = chats("Tell me", "The capital of France", "hello")
    state = torch.get_rng_state()
    texts = writer(asked, **OPTIONS)
    assert torch.equal(torch.get_rng_state(), state) and len(texts) == 3
    prompt = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True) for chat in asked]
    spent = dict(writer.tokens)
    assert spent["prompt"] == sum(len(row["input_ids"]) for row in prompt) and 3 <= spent["completion"] <= 18
    assert writer(asked, **OPTIONS) == texts and writer(asked, **OPTIONS | {"seed": 4}) != texts
    assert writer.tokens["prompt"] == 3 * spent["prompt"]


def test_a_text_is_cut_off_or_ends_at_its_end_or_a_stop_string(tiny_llama):
    make_model, tokenizer = tiny_llama
    model = make_model()
    model.lm_head = torch.nn.Linear(32, model.config.vocab_size)

    def always(token):
        with torch.no_grad():
            model.lm_head.weight.zero_(), model.lm_head.bias.zero_()
            model.lm_head.bias[token] = 50.0
        return LocalWriter(model, tokenizer)

    letter = tokenizer("A", add_special_tokens=False)["input_ids"][0]
    assert always(tokenizer.eos_token_id)(chats("hi"), **OPTIONS) == [""]
    cut = always(letter)(chats("hi"), **OPTIONS)[0]
    assert cut == tokenizer.decode([letter] * 6) and isinstance(cut, Cut)
    stopped = always(letter)(chats("hi"), **OPTIONS, stop=("never", "AA"))[0]
    assert stopped == "" and not isinstance(stopped, Cut)


def test_a_plain_model_continues_the_text(tiny_llama, monkeypatch):
    make_model, tokenizer = tiny_llama
    monkeypatch.setattr(tokenizer, "chat_template", None)
    writer = LocalWriter(make_model(), tokenizer)
    asked = []
    monkeypatch.setattr(
        "lifecycle_hf.synthesis.writers.generate", lambda model, ids, **o: asked.extend(ids) or [[1]] * len(ids)
    )
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "goodbye"}]
    writer([*chats("Tell me"), [*turns, turns[0]], turns], **OPTIONS)
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in asked]
    turns = "user: hello\n\nassistant: goodbye\n\nuser: hello\n\nassistant:"
    assert texts == ["Tell me", turns, "hello\ngoodbye"]  # the start of an answer is the end of the request


def test_a_model_goes_on_with_the_start_of_an_answer(tiny_llama, monkeypatch):
    make_model, tokenizer = tiny_llama
    asked = []
    monkeypatch.setattr(
        "lifecycle_hf.synthesis.writers.generate", lambda model, ids, **o: asked.extend(ids) or [[1]] * len(ids)
    )
    LocalWriter(make_model(), tokenizer)(
        [[*chats("hello")[0], {"role": "assistant", "content": "Task 9:"}]], **OPTIONS
    )
    assert tokenizer.decode(asked[0]).replace(" ", "").endswith("<|user|>hello<|assistant|>Task9:")


def test_a_prompt_that_does_not_fit_is_told(tiny_llama):
    make_model, tokenizer = tiny_llama
    with pytest.raises(ValueError, match=r"max_tokens=250 do not fit in the context of 256 tokens: lower max_tokens"):
        LocalWriter(make_model(), tokenizer)(chats("Tell me a story"), max_tokens=250, temperature=0, seed=0)


def test_a_server_writes(stand_in):
    def answer(body, number):
        content = body["messages"][-1]["content"]
        if content == "nothing":
            return 200, {"choices": [{"message": {"content": None}}]}
        found = says(f"{content} {body['seed']} {body['max_tokens']} {body['temperature']} {body.get('stop')}")
        found["choices"][0]["finish_reason"] = "length" if content == "b" else "stop"
        return 200, found

    stand_in.answer = answer
    writer = ServerWriter(ChatServer(stand_in.url, "m"))
    texts = writer(chats("a", "b", "nothing"), **OPTIONS, stop=["."])
    assert texts == ["a 3 6 1.0 ['.']", "b 4 6 1.0 ['.']", ""]
    assert [isinstance(text, Cut) for text in texts] == [False, True, False]
    start = {"role": "assistant", "content": "c"}
    assert writer([[*chats("a")[0], start]], **OPTIONS) == ["a\nc 3 6 1.0 None"] and writer.tokens == {
        "prompt": 30,
        "completion": 3,
    }


def test_a_record_asks_once_and_goes_on_after_a_kill(tmp_path):
    calls = []

    class Counts:
        name, batch_size, tokens = "counts", 2, {"prompt": 0, "completion": 0}

        def __call__(self, chats, **options):
            calls.append([chat[0]["content"] for chat in chats])
            self.tokens["prompt"] += 10 * len(chats)
            self.tokens["completion"] += len(chats)
            return [Cut(text) if "B" in text else text for text in shouts(chats, **options)]

    path = tmp_path / "new" / "written.jsonl"
    whole = Recorded(Counts(), path)
    asked = chats("a", "b", "é\ud800", "d", "e")
    texts = whole(asked, **OPTIONS)
    assert texts == ["A 3", "B 3", "É? 5", "D 5", "E 7"] and calls == [["a", "b"], ["é\ud800", "d"], ["e"]]
    assert whole.tokens == {"prompt": 50, "completion": 5}
    data = path.read_bytes()
    second = data.split(b"\n")[1]
    path.write_bytes(data[: data.index(second) + second.index("É".encode()) + 1])  # a kill within a letter
    again = Recorded(Counts(), path)
    assert again(asked, **OPTIONS) == texts and calls[3:] == calls[1:3]
    assert path.read_bytes() == data and again.tokens == whole.tokens
    assert isinstance(again(asked[:2], **OPTIONS)[1], Cut) and again([], **OPTIONS) == [] and len(calls) == 5
    again(asked[:2], **OPTIONS | {"temperature": 0.5})
    assert len(calls) == 6


@pytest.mark.parametrize(
    ("says", "message"),
    [
        (
            lambda chats, **o: ["one"],
            r"'mine' returned 1 texts for 2 chats\. What it wrote before is in .*written.jsonl",
        ),
        (lambda chats, **o: None, "'mine' returned None for 2 chats"),
        (lambda chats, **o: "ab", "'mine' returned 'ab' for 2 chats"),
        (lambda chats, **o: ["one", 2.5], "'mine' returned 2.5 for chat 1, 'second': it must be a text"),
        (lambda chats, **o: {}["x"], "'mine' failed: KeyError: 'x'"),
    ],
)
def test_garbage_is_named_and_nothing_is_lost(says, message, tmp_path):
    path = tmp_path / "written.jsonl"
    Recorded(shouts, path)(chats("zeroth"), **OPTIONS)
    says.__name__ = "mine"
    with pytest.raises(ValueError, match=message):
        Recorded(says, path)(chats("first", "second"), **OPTIONS)
    assert [json.loads(line)["texts"] for line in path.read_text().splitlines()] == [["ZEROTH 3"]]


def test_a_server_that_hangs_is_named(stand_in, tmp_path):
    import time

    stand_in.answer = lambda body, number: time.sleep(0.5) or (200, says("late"))
    writer = ServerWriter(ChatServer(stand_in.url, "slow", timeout=0.1, retries=0))
    with pytest.raises(ValueError, match="'slow' failed: ValueError: .*did not answer a request .ReadTimeout"):
        Recorded(writer, tmp_path / "written.jsonl")(chats("a"), **OPTIONS)
