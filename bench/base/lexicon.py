"""Word lists and number words for `skills.py`."""

from __future__ import annotations

import random

MONTHS = ["January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November", "December"]
MONTH_DAYS = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
WEEKDAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
ONES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"]
TENS = ["-", "-", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
IRREGULAR = {"one": "first", "two": "second", "three": "third", "five": "fifth", "eight": "eighth", "nine": "ninth", "twelve": "twelfth"}
NAMES = ["Ada", "Alan", "Alice", "Amir", "Anna", "Anton", "Aya", "Ben", "Boris", "Carla", "Carlos", "Chen", "Clara", "Dana", "Daniel", "David", "Diana", "Elena", "Emil", "Emma", "Eric", "Eva", "Fatima", "Felix", "Frank", "Grace", "Hana", "Hans", "Hugo", "Ida", "Igor", "Ines", "Ivan", "Jack", "James", "Jane", "Joan", "John", "Jonas", "Julia", "Karl", "Kate", "Kim", "Laura", "Lena", "Leo", "Linda", "Lucas", "Lucy", "Maria", "Mark", "Martin", "Mary", "Max", "Maya", "Mia", "Mohammed", "Nadia", "Nina", "Noah", "Nora", "Olga", "Oscar", "Otto", "Paul", "Pedro", "Peter", "Petra", "Priya", "Ravi", "Rita", "Robert", "Rosa", "Ruth", "Sam", "Sara", "Simon", "Sofia", "Stella", "Susan", "Tara", "Thomas", "Tim", "Tom", "Uma", "Vera", "Victor", "Wei", "Yusuf", "Zoe"]
PLACES = ["Accra", "Athens", "Austin", "Berlin", "Bern", "Bonn", "Boston", "Cairo", "Chicago", "Dakar", "Delhi", "Denver", "Dublin", "Geneva", "Hanoi", "Havana", "Helsinki", "Istanbul", "Kyiv", "Lagos", "Leeds", "Lima", "Lisbon", "London", "Madrid", "Manila", "Milan", "Munich", "Nairobi", "Oslo", "Paris", "Porto", "Prague", "Quito", "Riga", "Rome", "Seoul", "Sofia", "Sydney", "Tokyo", "Toronto", "Tunis", "Turin", "Vienna", "Warsaw", "York", "Zurich"]
NOUNS = ["apple", "bag", "ball", "basket", "bell", "bench", "bicycle", "blanket", "board", "boat", "book", "bottle", "bowl", "box", "bridge", "brush", "bucket", "button", "cable", "camera", "candle", "car", "card", "carpet", "chair", "clock", "cloth", "coat", "computer", "cup", "curtain", "desk", "door", "drawer", "drum", "engine", "fan", "fence", "file", "flag", "flower", "fork", "garden", "gate", "glass", "glove", "guitar", "hammer", "hat", "helmet", "horse", "house", "jacket", "jar", "kettle", "key", "keyboard", "knife", "ladder", "lamp", "letter", "lock", "machine", "map", "mirror", "monitor", "motor", "mug", "needle", "newspaper", "oven", "painting", "pan", "paper", "pen", "pencil", "phone", "piano", "picture", "pillow", "pipe", "plate", "pot", "printer", "pump", "radio", "ring", "road", "robot", "roof", "rope", "rug", "ruler", "sail", "scarf", "screen", "shelf", "ship", "shirt", "shoe", "sink", "sofa", "spoon", "stone", "stool", "stove", "string", "suitcase", "switch", "table", "tent", "ticket", "tool", "towel", "tower", "toy", "train", "tray", "tree", "truck", "umbrella", "vase", "wagon", "wall", "watch", "wheel", "window", "wire"]
ADJECTIVES = ["old", "new", "small", "large", "heavy", "light", "round", "square", "long", "short", "thin", "thick", "soft", "hard", "warm", "cold", "dry", "wet", "clean", "broken", "quiet", "loud", "fast", "slow", "cheap", "expensive", "simple", "strong", "weak", "wide", "narrow", "empty", "full", "bright", "dark", "smooth", "sharp", "folding", "portable", "modern", "robust", "compact", "wooden"]
COLOURS = ["red", "green", "blue", "yellow", "black", "white", "grey", "brown", "orange", "purple", "pink", "silver", "golden", "beige"]
VERBS = ["opened", "closed", "painted", "moved", "sold", "bought", "found", "lost", "cleaned", "repaired", "carried", "dropped", "measured", "lifted", "copied", "counted", "checked", "ordered", "returned", "borrowed", "hid", "kept", "broke", "folded", "packed", "weighed", "tested"]
SYLLABLES = ["ba", "be", "bi", "bo", "bu", "da", "de", "di", "do", "du", "fa", "fe", "fi", "fo", "ga", "go", "gu", "ka", "ke", "ki", "ko", "la", "le", "li", "lo", "lu", "ma", "me", "mi", "mo", "mu", "na", "ne", "ni", "no", "nu", "pa", "pe", "po", "ra", "re", "ri", "ro", "ru", "sa", "se", "si", "so", "su", "ta", "te", "ti", "to", "tu", "va", "ve", "vi", "vo", "za", "zo", "bran", "dell", "kor", "lin", "mar", "nel", "pol", "ran", "sten", "tor", "val", "wen", "zar", "dor", "fin", "gal", "han", "jor"]
ABBREVIATIONS = {"kilograms": "kg", "grams": "g", "metres": "m", "centimetres": "cm", "millimetres": "mm", "kilometres": "km", "litres": "l", "millilitres": "ml",
                 "seconds": "s", "minutes": "min", "hours": "h", "watts": "W", "kilowatts": "kW", "volts": "V", "bytes": "B", "megabytes": "MB", "per cent": "%",
                 "degrees": "deg", "hertz": "Hz", "percent": "%"}
OPPOSITES = {"old": "new", "new": "old", "small": "large", "large": "small", "heavy": "light", "long": "short", "short": "long", "thin": "thick", "soft": "hard",
             "warm": "cold", "cold": "warm", "dry": "wet", "clean": "dirty", "quiet": "loud", "fast": "slow", "slow": "fast", "cheap": "expensive", "strong": "weak",
             "wide": "narrow", "empty": "full", "full": "empty", "bright": "dark", "dark": "bright", "smooth": "rough", "open": "closed", "first": "last",
             "before": "after", "above": "below", "left": "right", "true": "false", "yes": "no", "up": "down", "start": "end", "read": "write", "minimum": "maximum"}


def number_words(n: int) -> str:
    """0 <= n < 10,000 in English words: 342 is "three hundred and forty-two"."""
    if n < 20:
        return ONES[n]
    if n < 100:
        return TENS[n // 10] + (f"-{ONES[n % 10]}" if n % 10 else "")
    size, name = (100, "hundred") if n < 1000 else (1000, "thousand")
    head, rest = divmod(n, size)
    return f"{number_words(head)} {name}" + ("" if not rest else f" and {number_words(rest)}" if rest < 100 else f" {number_words(rest)}")


def ordinal_words(n: int) -> str:
    """1 <= n < 100: 23 is "twenty-third"."""
    head, _, last = number_words(n).rpartition("-")
    last = IRREGULAR.get(last, last[:-1] + "ieth" if last.endswith("y") else last + "th")
    return f"{head}-{last}" if head else last


def ordinal_digits(n: int) -> str:
    """23 is "23rd"."""
    return f"{n}{'th' if 10 < n % 100 < 14 else {1: 'st', 2: 'nd', 3: 'rd'}.get(n % 10, 'th')}"


def year_words(n: int) -> str:
    """1100 <= n < 2100 as it is spoken: 1984 is "nineteen eighty-four", 2007 "two thousand and seven"."""
    century, rest = divmod(n, 100)
    if century == 20 and rest < 10:
        return "two thousand" + (f" and {ONES[rest]}" if rest else "")
    return f"{number_words(century)} " + ("hundred" if not rest else f"oh {ONES[rest]}" if rest < 10 else number_words(rest))


def plural(noun: str) -> str:
    if noun in ("knife", "shelf"):
        return {"knife": "knives", "shelf": "shelves"}[noun]
    return noun + ("es" if noun.endswith(("s", "sh", "ch", "x")) else "s")


def cased(rng: random.Random, word: str) -> str:
    return rng.choice((word.capitalize(), word.capitalize(), word.upper()))


def everyday() -> list[str]:
    """The words that the tokenizer should hold whole, with and without a space before them."""
    numbers = [*ONES, *TENS[2:], "hundred", "thousand", *(ordinal_words(n) for n in range(1, 20)), *(ordinal_words(n) for n in range(20, 100, 10))]
    return [*numbers, *MONTHS, *WEEKDAYS, *COLOURS, *NOUNS, *ADJECTIVES, *NAMES, *PLACES, *ABBREVIATIONS, *VERBS]
