"""Templates in both formats: what they render, which columns they need, and what is refused."""

import pickle

import pytest
import yaml

from lifecycle_hf.data.templates import OWN, Template, build, find_templates

FAMILIES = ("classification", "qa", "summarization", "generation", "maths", "extraction")
ROW = {"instruction": "Add.", "input": "2 and 3", "output": "5"}


def test_python_format_and_jinja_render_the_same():
    plain = Template("Q: {instruction} ({input})", "{output}")
    jinja = Template("Q: {{ instruction }} ({{ input }})", "{{ output }}")
    assert plain.render(ROW) == jinja.render(ROW) == ("Q: Add. (2 and 3)", "5")
    assert plain.fields == jinja.fields == plain.needs == jinja.needs == {"instruction", "input", "output"}


def test_values_are_not_templates():
    """Braces in a value stay as they are, in both formats."""
    row = ROW | {"input": "{output} {{ output }} {% raw %}"}
    assert Template("{input}").render(row)[0] == Template("{{ input }}").render(row)[0] == row["input"]


def test_a_tested_column_may_be_empty():
    template = Template("{{ instruction }}{% if input %}\n{{ input }}{% endif %}{{ ' !' if loud else '' }}")
    assert template.fields == {"instruction", "input", "loud", "output"}
    assert template.needs == {"instruction", "output"}
    assert template.render({"instruction": "Add.", "input": None, "output": "5"}) == ("Add.", "5")


def test_loops_filters_and_globals():
    template = Template("{% for i in range(choices | length) %}{{ i }}: {{ choices[i] }} {% endfor %}", "{{ answer }}")
    assert template.needs == {"choices", "answer"}
    assert template.render({"choices": ["no", "yes"], "answer": 1}) == ("0: no 1: yes ", "1")


@pytest.mark.parametrize(
    ("prompt", "problem"),
    [
        ("{input.__class__}", "template '{input.__class__}': a brace that belongs to no field"),
        ("Answer in JSON: {", "a brace that belongs to no field"),
        ("{% if input %}", "template '{% if input %}': Unexpected end of template"),
        ("  ", "the text is empty"),
        (3, "template '3': 'int' object has no attribute 'strip'"),
    ],
)
def test_invalid_texts(prompt, problem):
    with pytest.raises(ValueError, match=problem):
        Template(prompt)


def test_jinja_runs_in_a_sandbox():
    for text in ("{{ input.__class__.__mro__ }}", "{{ input.append(1) }}"):
        with pytest.raises(ValueError, match="template 'leak': .*(unsafe|not safely)"):
            Template(text, name="leak").render({"input": [1], "output": "5"})


def test_templates_can_be_sent_to_another_process():
    template = Template("{{ instruction }}")
    assert template.needs
    assert pickle.loads(pickle.dumps(template)).render(ROW) == ("Add.", "5")


@pytest.mark.parametrize("family", FAMILIES)
def test_own_templates(family):
    """Every template shows all that the row has; an inverted one asks for what a direct one shows."""
    templates = find_templates(None, [family], "here")
    assert len(templates) >= 5 and len({template.name for template in templates}) == len(templates)
    assert sum(template.inverted for template in templates) >= 1
    for template in templates:
        prompt, completion = template.render(ROW)
        texts = {"Add.", "2 and 3", "5"}
        assert (completion == "5") == (not template.inverted)
        assert completion != "5" or texts - {"5"} <= {text for text in texts if text in prompt}
        assert not template.inverted or "5" in prompt
        if template.inverted:
            assert completion not in prompt
    direct = [template for template in templates if not template.inverted]
    assert {"instruction", "output"} in [template.needs for template in direct]  # a row without an input has some


def test_own_file_has_these_families_alone():
    assert tuple(yaml.safe_load(OWN.read_text())) == FAMILIES
    assert find_templates(None, ["poems"], "here") == []


def test_files_and_lists(tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text("sums:\n- '{a} + {b} ='\n- {prompt: '{c} =', completion: '{a} + {b}', inverted: true}\n")
    first, second = find_templates(file, ["unknown", "sums"], "here")
    assert first == Template("{a} + {b} =") and second == Template("{c} =", "{a} + {b}", inverted=True)
    assert find_templates([first, "{a}"], [], "here") == [first, Template("{a}")]
    with pytest.raises(ValueError, match=r"task 'x': .*own.yaml has templates for \['sums'\], not for x"):
        find_templates(str(file), ["x", None], "task 'x'")
    file.write_text("sums: [{promt: a}]")
    with pytest.raises(
        ValueError, match="here, own.yaml: .*'promt'. The options are prompt, completion, inverted, name"
    ):
        find_templates(file, ["sums"], "here")


def test_options_from_a_file_are_named():
    with pytest.raises(ValueError, match="here: .*missing 1 required positional argument: 'prompt'"):
        build(Template, {}, "here")
    with pytest.raises(ValueError, match="here: template '{': a brace"):
        build(Template, {"prompt": "{"}, "here")
