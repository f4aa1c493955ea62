"""Keyword rules that tell what kind of thing a definition defines: the labelling functions of weak_supervision.py.

Written from knowledge of English, dictionaries and the ten classes, after reading some 400 of the 5,000 *training*
definitions (none of the test ones), and not tuned afterwards: no rule was changed because of its accuracy or of what
a model made of it. A rule votes for its class where its pattern occurs, and abstains elsewhere. Their errors are those
of real rules: they hang together with the text and with one another ("a drink made from the leaves of a tree").
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from hf_robust_ft import ABSTAIN

# Class → name → pattern. Patterns meet whole words, unless they start at the beginning of the text.
PATTERNS: dict[str, dict[str, str]] = {
    "act": {
        "opening": r"^(\(.*?\) )?(the|an?) (act|action|process|activity|practice|work|service) (of|that|in)",
        "doing": r"performed|performing|competition|attack|movement|surgery|treatment|campaign|crime",
        "games": r"game|sport|dance|stroke|contest|ceremony|warfare|military operation",
    },
    "person": {
        "opening": r"^(\(.*?\) )?(someone|somebody|one) (who|whose|that)|^(\(.*?\) )?(an?|the) person",
        "life": r"\(?(born in )?\d{4}(-\d{4})?\)",
        "trades": r"writer|composer|actor|actress|painter|politician|king|general|scientist|physicist|poet",
        "belonging": r"member of|inhabitant|native|who|woman|man|worker|expert|employee",
    },
    "location": {
        "opening": r"^(an?|the) (\w+ )?(city|town|village|port|capital|county|region|district|island)",
        "parts": r"(northern|southern|eastern|western|central|southeastern|southwestern|northwestern)",
        "kinds": r"city|town|state|country|republic|region|area|province|border|located|territory",
    },
    "plant": {
        "opening": r"^(an?|any( of (various|several|numerous))?|small|tall|large)? ?(\w+ )*(herb|shrub|tree)s?\b",
        "parts": r"leaves|flowers?|flowering|seeds?|roots?|foliage|stems?|bark|blossoms?|berries",
        "kinds": r"herbs?|shrubs?|trees?|plants?|ferns?|grass|orchids?|vines?|mosses|fung(i|us)|mushrooms?",
        "habits": r"evergreen|perennial|deciduous|annual|cultivated|tropical american|ornamental",
    },
    "animal": {
        "opening": r"^(an?|any of (various|several|numerous)|small|large) (\w+[ -])*(fish|bird|insect|mammal)",
        "kinds": r"birds?|fish(es)?|insects?|mammals?|snakes?|lizards?|beetles?|moths?|dogs?|breed",
        "parts": r"wings?|tail|legs|fur|beak|snout|fins?|plumage|shell|larva[el]?|feeds? on",
        "taxa": r"type genus|(genus|family) of .*(fish|bird|insect|mammal|reptile|mollus|snake|moth)",
    },
    "substance": {
        "opening": r"^(an?|any|the|\w+) (\w+ )*(compound|substance|mineral|element|acid|material)\b",
        "chemistry": r"acids?|compounds?|chemical|salts?|oxide|metal(lic)?|protein|alloy|element",
        "looks": r"colou?rless|crystal(line|s)?|liquid|powder|gas|mineral|rocks?|resin|oil|solution",
    },
    "artifact": {
        "opening": r"^(an?|the) (\w+ )*(device|instrument|machine|tool|garment|vehicle|container)\b",
        "purpose": r"used (to|for|by|in|as)|designed (to|for)|for (holding|carrying|making|cutting)",
        "kinds": r"building|room|ship|boat|vehicle|weapon|furniture|cloth|fabric|shoe|equipment|wheels?",
        "drugs": r"drug|trade names?|antibiotic|medication",
    },
    "body": {
        "opening": r"^(an?|the|any|one) (\w+ )*(muscle|nerve|vein|artery|bone|gland|cell|membrane)\b",
        "parts": r"muscles?|bones?|nerves?|veins?|arter(y|ies)|skull|skin|tissue|glands?|blood|organ|hair",
        "places": r"of the (body|head|neck|eye|ear|arm|leg|hand|foot|brain|heart|abdomen|spine)|anatom\w+",
    },
    "communication": {
        "opening": r"^(an?|the) (\w+ )*(statement|message|word|document|symbol|letter)\b",
        "writing": r"written|writing|book|letters?|document|page|printed|text|story|poem",
        "speech": r"words?|language|speech|spoken|message|expression|statement|question|song",
        "shows": r"music|musical|drama|play|broadcast|information|sign|symbol",
    },
    "food": {
        "opening": r"^(an?|the)? ?(\w+ )*(dish|sauce|soup|bread|cake|cheese|wine|drink|meat)\b",
        "taste": r"sweet|sour|spicy|flavou?red|tasting|edible|eaten|seasoned",
        "kitchen": r"cooked|baked|fried|roasted|served|dough|sugar|butter|meat|cheese|sauce|cream|vegetables?",
        "drinks": r"wine|beer|drink|beverage|liqueur|cocktail|brandy|juice|tea|coffee",
    },
}

NAMES = [f"{class_name}_{name}" for class_name, patterns in PATTERNS.items() for name in patterns]


def vote(texts: Sequence[str], class_names: Sequence[str]) -> npt.NDArray[np.int64]:
    """The votes of all rules, [texts, rules] in the order of ``NAMES``, -1 where a rule abstains.

    Raises:
        ValueError: a rule's class is not among ``class_names``.
    """
    unknown = sorted(set(PATTERNS) - set(class_names))
    if unknown:
        raise ValueError(f"the rules vote for {unknown}, but the classes are {list(class_names)}; write rules for them")
    columns = []
    for class_name, patterns in PATTERNS.items():
        for pattern in patterns.values():
            # A bar inside the pattern must not take the word borders with it.
            found = re.compile(pattern if pattern.startswith("^") else rf"(?<!\w)(?:{pattern})(?!\w)", re.IGNORECASE)
            hits = np.array([found.search(text) is not None for text in texts], dtype=bool)
            columns.append(np.where(hits, list(class_names).index(class_name), ABSTAIN))
    return np.stack(columns, axis=1)
