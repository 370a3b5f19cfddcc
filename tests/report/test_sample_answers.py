"""Sample answers become cells that no text can break out of, whatever a model writes."""

from html.parser import HTMLParser

from jinja2 import Environment, PackageLoader

from loragrid.comparison.sample_answers import Answer, SampleRow, SampleTable
from loragrid.report.files import _markdown_table
from loragrid.report.sample_answers import MOST_CHARACTERS, one_line, sample_sentences, sample_table
from loragrid.report.tables import PageTable

HOSTILE = '</td></table><script>alert("x")</script>\n\n| x | `y` ![z](http://e) \x00\x1b[2J\u202e\u2028end &amp; \\'


def table_of(*rows: SampleRow) -> PageTable:
    trial_ids = dict.fromkeys(rows[0].answers, "t")
    samples = SampleTable(split="test", decoding="greedy", trial_ids=trial_ids, rows=rows, problems={})
    return sample_table(samples)


def row_of(prompt: str, reference: str, base: Answer | None, **answers: Answer) -> SampleRow:
    return SampleRow(row="0", prompt=prompt, reference=reference, base=base, answers=answers)


def test_a_hostile_text_stays_inside_its_html_cell() -> None:
    table = table_of(row_of(HOSTILE, HOSTILE, Answer(text=HOSTILE), lora=Answer(text=HOSTILE)))
    environment = Environment(loader=PackageLoader("loragrid.report"), autoescape=True)
    source = environment.loader.get_source(environment, "report.html.j2")[0]  # type: ignore[union-attr]
    macro = source[: source.index("{% macro chart")] + "{{ table(content) }}"
    tags: list[str] = []
    texts: list[str] = []

    class Page(HTMLParser):
        def handle_starttag(self, tag: str, attrs: object) -> None:
            tags.append(tag)

        def handle_data(self, data: str) -> None:
            texts.append(data)

    page = Page(convert_charrefs=True)
    page.feed(environment.from_string(macro).render(content=table))
    assert set(tags) == {"div", "table", "thead", "tbody", "tr", "th", "td"}
    assert tags.count("tr") == 2
    assert sum(one_line(HOSTILE) in text for text in texts) == 4


def test_a_hostile_text_stays_inside_its_markdown_cell() -> None:
    table = table_of(row_of("a", HOSTILE, None, lora=Answer(text=HOSTILE)))
    lines = _markdown_table(table).splitlines()
    assert len(lines) == 3
    assert lines[2].replace("\\|", "").count("|") == 5
    assert "<" not in lines[2]
    assert lines[2].isprintable()


def test_no_control_or_format_character_is_left() -> None:
    assert one_line("a\x00b\x1b[2J c\u202ed\ufeff\n\t e\u2028f\u2029") == "ab[2J cd e f"
    assert one_line("é 中 😀 x²") == "é 中 😀 x²"


def test_long_texts_are_cut_and_marked() -> None:
    text = "".join(f"{number} " for number in range(900)).strip()
    ((prompt, reference, base, lora),) = table_of(
        row_of(text, text, Answer(text=text), lora=Answer(text="short", is_complete=False))
    ).rows
    for cell in (prompt, reference, base):
        assert len(cell.text) <= MOST_CHARACTERS
        assert "…" in cell.text
    assert prompt.text.startswith("0 1 2")
    assert prompt.text.endswith("898 899"), "the question stands at the end of a prompt"
    assert lora.text == "short …"


def test_missing_and_empty_answers_are_told_apart() -> None:
    first = row_of("p", "r", None, lora=Answer(text=" \n"), vera=Answer(text="yes"))
    second = row_of("p", "r", Answer(text="b"), lora=Answer(text="no"))
    found = [[cell.text for cell in row] for row in table_of(first, second).rows]
    assert found == [["p", "r", "–", "(empty)", "yes"], ["p", "r", "b", "no", "–"]]


def test_the_sentences_name_rows_decoding_and_problems() -> None:
    samples = SampleTable(
        split="eval",
        decoding="greedy, at most 9 new tokens",
        trial_ids={"lora": "t"},
        rows=(row_of("p", "r", None),),
        problems={"full": "it has\nno cache"},
    )
    first, second = sample_sentences(samples)
    assert "first evaluation rows of different groups" in first
    assert "greedy, at most 9 new tokens" in first
    assert second == "full has no sample answers: it has no cache"
