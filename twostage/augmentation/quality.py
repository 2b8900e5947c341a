"""Is an answer a paraphrase? What is cleaned off it, what is refused, and how a class fared.

Cleaned off, by these rules alone and in this order, unless the source text has the same:

    characters  what no table can hold: control characters but tabs and line ends, halves of pairs
    thinking    a leading `<think>…</think>`, which some local models print
    rules       leading and trailing lines that hold nothing but `---`, as the prompt has one
    labels      a leading `Rephrased:`, `Paraphrased phrase:`, `Here is a rephrased version:` …
    quotes      one pair around the whole, with none of its kind inside

and white space at both ends. Then the first of these that holds is the verdict:

    refused     the server or the model says no: `refusal`, `content_filter`, or a text that begins
                with "as an AI", "I cannot assist", "I'm sorry, but you haven't …", "please provide
                the text" and their like, where the source does not
    truncated   cut at the limit of its length
    empty       nothing is left
    copy        the source itself, but for case, punctuation and white space
    duplicate   a text that the pool already has, likewise
    good        a paraphrase, for all that can be seen from outside
"""

import re
from dataclasses import dataclass, field

GOOD, DUPLICATE, COPY = "good", "duplicate", "copy"
REFUSED, TRUNCATED, EMPTY = "refused", "truncated", "empty"
BAD = (DUPLICATE, COPY, REFUSED, TRUNCATED, EMPTY)

_UNWRITABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")
_THINKING = re.compile(r"\s*<think>.*?</think>", re.DOTALL)
_RULE = re.compile(r"\A(?:[ \t]*-{3,}[ \t]*(?:\n|\Z))+|(?:(?:\A|\n)[ \t]*-{3,}[ \t]*)+\Z")
_LABEL = re.compile(
    r"""(?:(?:sure|certainly|of\ course|okay|ok)\s*[,!.:]\s*)?
        (?:here(?:'s|’s|\ is)\s+(?:the|a|an|one|another|your)\s+)?
        (?:possible\s+|alternative\s+|different\s+|new\s+)?
        (?:rephrased?|rephrasing|paraphrased?|paraphrasing|reworded|rewording|rewritten|rewrite
           |alternative|alternate)
        (?:\s+(?:phrase|version|text|sentence|form|wording|way\ to\ say\ it))?
        (?:\s+(?:could|would|might)\s+be)?
        \s*:\s*""",
    re.IGNORECASE | re.VERBOSE,
)
_QUOTES = {'"': '"', "'": "'", "“": "”", "‘": "’", "«": "»", "„": "“", "`": "`"}
_THING = r"""\b(?:that(?=\s*[.,!?]|\Z)|(?:re|para)phras\w+|phrases?|text|sentence|request|response
    |context|content|information)"""
_UNABLE = rf"""i(?:['’]m|\ am)?\ (?:really\ )?
    (?:cannot|can\ not|can['’]t|won['’]t|unable\ to|not\ able\ to|do\ not|don['’]t)\b .{{0,40}}?
    (?:\b(?:assist|help\ (?:you|with)|comply|rephrase|paraphrase|reword|rewrite)\b
      |\b(?:fulfil\w*|generate|provide|have|process)\b .{{0,30}}? {_THING})"""
_GIVEN = (
    r"\b(?:phrase|text|sentence|input)\b .{0,40}? \b(?:provided|incomplete|cut\ off|not\ clear)"
)
_REFUSAL = re.compile(
    rf"""as\ an\ ai(?:\ (?:language\ )?(?:model|assistant))?\b(?:,|\ (?:model|assistant)|\ i\b)
      |as\ an\ ai\ language\ model\b
      |{_UNABLE}
      |(?:i['’]m\ |i\ am\ |i\ |my\ )?(?:really\ |very\ |so\ )?
        (?:sorry|apologi[sz]e|apologies|unfortunately)\b .{{0,60}}?
        (?:\b{_UNABLE}
          |\byou\ (?:have\ not|haven['’]t|did\ not|didn['’]t)\b
          |{_GIVEN})
      |it\ (?:seems|appears|looks)\ (?:like|that)\b .{{0,60}} {_GIVEN}
      |(?:please|could\ you|can\ you)\ (?:please\ )?(?:provide|share|clarify)\b
        .{{0,60}} \b(?:phrase|text|sentence|context|input)\b""",
    re.IGNORECASE | re.VERBOSE | re.DOTALL,
)
_WORD = re.compile(r"\w+")


def clean(content: str, source: str) -> str:
    """The paraphrase in an answer, by the rules above."""
    text = _UNWRITABLE.sub("", content).strip()
    if not source.lstrip().startswith("<think>"):
        text = _THINKING.sub("", text, count=1).strip() if _THINKING.match(text) else text
    if not _RULE.search(source):
        text = _RULE.sub("", text).strip()
    label = _LABEL.match(text)
    if label and not _LABEL.match(source.strip()):
        text = text[label.end() :].strip()
    return _without_quotes(text, source.strip())


def judge(text: str, finish_reason: str, source: str) -> str:
    """The verdict on a cleaned answer, but for `duplicate`, which only the pool knows."""
    if finish_reason in ("refusal", "content_filter", "prompt_filter"):
        return REFUSED
    if finish_reason == "length":
        return TRUNCATED
    if not text:
        return EMPTY
    if _REFUSAL.match(text) and not _REFUSAL.match(source):
        return REFUSED
    return COPY if normalize(text) == normalize(source) else GOOD


def normalize(text: str) -> str:
    """What makes two texts the same: their words, whatever their case and punctuation."""
    return " ".join(_WORD.findall(text.casefold())) or text.strip()


def lexical_overlap(text: str, source: str) -> float:
    """Share of common words among the words of both (Jaccard): 1 is the same words, 0 is none."""
    words, source_words = set(normalize(text).split()), set(normalize(source).split())
    union = words | source_words
    return len(words & source_words) / len(union) if union else 1.0


@dataclass
class ClassQuality:
    """How the answers for one class fared. The verdicts count answers, asked again or not."""

    asked: int = 0
    kept: int = 0
    """Paraphrases in the pool, duplicates and copies that had to do among them."""
    verdicts: dict[str, int] = field(default_factory=lambda: dict.fromkeys((GOOD, *BAD), 0))
    kept_duplicates: int = 0
    kept_copies: int = 0
    given_up: int = 0
    """Draws that brought nothing."""
    words: int = 0
    """Of what was kept, in all."""
    overlap: float = 0.0
    """The lexical overlap with the source, summed over what was kept."""

    @property
    def mean_words(self) -> float:
        return self.words / self.kept if self.kept else 0.0

    @property
    def mean_overlap(self) -> float:
        return self.overlap / self.kept if self.kept else 0.0


def _without_quotes(text: str, source: str) -> str:
    if len(text) < 2 or _QUOTES.get(text[0]) != text[-1]:
        return text
    if len(source) >= 2 and _QUOTES.get(source[0]) == source[-1]:
        return text
    inside = text[1:-1]
    # An apostrophe inside a word is no quote; any other of the same kind makes two quotations.
    rest = re.sub(r"(?<=\w)['’](?=\w)", "", inside)
    return text if text[0] in rest or text[-1] in rest else inside.strip()
