"""Who are the simulated patients? The hidden Markov model that every simulated cohort is drawn from.

A patient has one comorbidity profile for life (two conditions, a leading one and a companion). Each visit has a stage
of the disease, a Markov chain that starts at the first visit. The codes of a visit are drawn independently, with
replacement, from a distribution that depends on profile and stage only:

    emission = 12% background (every code, Zipf-like, the same for everyone)
             +  5% incidental codes of the profile, whatever the stage
             + 83% codes of the profile's two conditions, mostly of the kind that the stage calls for
               (diagnoses at onset, drugs under treatment, measurements when monitored, complications)

The model is fixed: it does not depend on a cohort's seed, so that two cohorts of different seeds are different patients
of the same population. How many visits and codes there are, and when, is no part of this model (`cohort.py` says why).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from behrt.config import Structure

CODE_COUNT = 995
"""Codes of the population: with the five special tokens a vocabulary of 1000, the size that the guide counts with."""
STAGES = ("onset", "treatment", "monitoring", "complication")
MODEL_SEED = 20_190_404
"""Seed of what is drawn once for all cohorts: filler codes, background order, incidental codes, transitions."""

BACKGROUND_SHARE = 0.12
INCIDENTAL_SHARE = 0.05
LEADING_SHARE = 0.68
"""Of the codes of a profile's conditions, the share of the leading condition."""
INCIDENTAL_CODES = 12
CODES_OF_A_KIND = (0.55, 0.25, 0.13, 0.07)
"""Shares of the (up to) four codes of one kind of one condition, in the order of `CONDITIONS`."""
BACKGROUND_EXPONENT = 0.6
"""A code's background share falls with its rank to this power: flat enough that each code reaches several patients."""

KIND_GIVEN_STAGE = np.array(  # [stages, kinds]; the kinds are diagnoses, drugs, measurements, complications
    [[0.66, 0.15, 0.15, 0.04], [0.12, 0.66, 0.16, 0.06], [0.06, 0.21, 0.67, 0.06], [0.06, 0.14, 0.14, 0.66]]
)
FIRST_STAGE = np.array([0.70, 0.18, 0.10, 0.02])  # [stages]
NEXT_STAGE = np.array(  # [stages, stages], the mean over profiles
    [[0.20, 0.62, 0.14, 0.04], [0.03, 0.45, 0.42, 0.10], [0.02, 0.14, 0.66, 0.18], [0.02, 0.50, 0.24, 0.24]]
)
NEXT_STAGE_CONCENTRATION = 30.0
"""Dirichlet concentration of a profile's own transition rows around `NEXT_STAGE`."""

PREFIXES = ("ICD10CM", "ATC", "LOINC", "ICD10CM")
"""Coding system of the four kinds of codes."""

# Condition: diagnoses, drugs, measurements, complications. Real ICD-10-CM, ATC and LOINC codes; several conditions
# share some (creatinine, INR, prednisone, …), so that no single code gives its profile away.
CONDITIONS: dict[str, tuple[str, str, str, str]] = {
    "hypertension": (
        "I10 R03.0 I16.0 Z13.6", "C09AA02 C08CA01 C03AA03 C09CA01",
        "8480-6 8462-4 2823-3 2160-0", "I11.9 H35.033 I67.4 I16.1",
    ),
    "type 2 diabetes": (
        "E11.9 E11.65 R73.03 R73.9", "A10BA02 A10BB12 A10BK03 A10AE04",
        "4548-4 2345-7 14959-1 2339-0", "E11.22 E11.42 E11.319 E11.621",
    ),
    "heart failure": (
        "I50.9 I50.22 R06.02 I42.9", "C03CA01 C07AB02 C03DA01 C09DX04",
        "33762-6 30934-4 2951-2 29463-7", "I50.23 J81.0 I27.20 R57.0",
    ),
    "COPD": (
        "J44.9 R05.3 J43.9 F17.210", "R03BB04 R03AC02 R03AK06 V03AN01",
        "20150-9 19926-5 2708-6 2019-8", "J44.1 J44.0 J96.11 J96.21",
    ),
    "chronic kidney disease": (
        "N18.30 N18.9 R80.9 N28.9", "C09CA06 B03XA01 V03AE02 A11CC05",
        "33914-3 2160-0 2777-1 2731-8", "N18.6 D63.1 E87.5 N25.81",
    ),
    "atrial fibrillation": (
        "I48.91 I48.0 R00.2 I48.20", "B01AF02 B01AA03 C07AB07 C01BD01",
        "6301-6 8867-4 5902-2 3016-3", "I49.5 D68.32 I63.40 I74.3",
    ),
    "coronary artery disease": (
        "I25.10 I20.9 R07.9 I20.1", "C10AA05 B01AC06 C01DA02 B01AC04",
        "13457-7 2093-3 10839-9 2085-9", "I21.4 I21.9 I25.5 I24.9",
    ),
    "asthma": (
        "J45.909 R06.2 J45.40 J30.9", "R03BA02 R03AK07 R03DC03 R03AC02",
        "19935-6 26449-9 19113-0 20150-9", "J45.901 J45.902 J45.41 J98.11",
    ),
    "depression": (
        "F32.9 F33.1 F32.1 R45.89", "N06AB06 N06AB10 N06AX16 N05CF01",
        "44261-6 69737-5 44249-1 3016-3", "F33.2 R45.851 G47.00 F32.2",
    ),
    "rheumatoid arthritis": (
        "M06.9 M05.79 M25.50 R76.8", "L04AX03 L04AB04 P01BA02 H02AB07",
        "1988-5 4537-7 11572-5 32218-0", "M05.10 D63.8 M81.8 M05.30",
    ),
    "osteoporosis": (
        "M81.0 Z78.0 M85.80 E55.9", "M05BA04 M05BX04 A12AA04 A11CC05",
        "38263-0 1989-3 17861-6 6768-6", "M80.08XA S72.001A S22.080A M84.48XA",
    ),
    "hypothyroidism": (
        "E03.9 E06.3 R53.83 R63.5", "H03AA01 H03AA02 H03AA03 A12CE02",
        "3016-3 3024-7 8099-4 3051-0", "E78.00 E03.5 D64.9 I31.39",
    ),
    "obesity": (
        "E66.9 E66.01 Z68.35 R63.2", "A10BJ06 A08AB01 A08AA62 A10BJ02",
        "39156-5 29463-7 8280-0 2571-8", "G47.33 K76.0 M17.9 E88.810",
    ),
    "stroke": (
        "I63.9 G45.9 R47.01 I69.351", "B01AC04 C10AA07 B01AC07 M03BX01",
        "13457-7 5902-2 3173-2 8480-6", "I69.391 R13.10 G81.90 I69.320",
    ),
    "Parkinson's disease": (
        "G20.A1 R25.1 G25.0 R26.89", "N04BA02 N04BC05 N04BD02 N04BB01",
        "8480-6 2132-9 77717-7 8867-4", "I95.1 R44.1 F02.80 W19.XXXA",
    ),
    "dementia": (
        "G30.9 F03.90 R41.3 G31.84", "N06DA02 N06DX01 N06DA03 N05AX08",
        "72106-8 72172-0 2132-9 2284-8", "F02.811 R41.0 J69.0 L89.159",
    ),
    "epilepsy": (
        "G40.909 R56.9 G40.209 R40.4", "N03AX14 N03AX09 N03AG01 N03AF01",
        "30471-7 4086-5 3432-2 1742-6", "G40.901 S06.0X0A G40.911 R56.1",
    ),
    "breast cancer": (
        "C50.911 N63.0 R92.8 D05.11", "L02BG03 L02BA01 L01FD01 L01CD02",
        "6875-9 718-7 26464-8 777-3", "C79.51 D70.1 I97.2 R11.0",
    ),
    "liver cirrhosis": (
        "K74.60 R18.8 K70.30 B18.2", "A06AD11 C07AA05 C03DA01 A07AA11",
        "1975-2 1751-7 1920-8 6301-6", "K76.6 I85.11 K76.82 K65.2",
    ),
    "inflammatory bowel disease": (
        "K50.90 K51.90 R19.7 K92.1", "A07EC02 L04AB02 L04AX01 H02AB07",
        "27925-7 1988-5 718-7 2276-4", "K50.012 K56.609 D50.0 K63.2",
    ),
    "alcohol use disorder": (
        "F10.20 F10.10 R78.0 Z72.89", "A11DA01 N07BB04 N07BB03 N05BA06",
        "2324-2 1920-8 5640-8 787-2", "F10.231 K70.10 K85.20 E51.2",
    ),
    "gout": (
        "M10.9 E79.0 M10.072 M25.50", "M04AA01 M04AC01 M04AA03 M01AE02",
        "3084-1 2160-0 1988-5 4537-7", "M1A.9XX1 N20.0 M10.30 N28.9",
    ),
    "HIV infection": (
        "B20 Z21 R75 B37.0", "J05AR20 J05AR13 J05AJ03 J01EE01",
        "20447-9 24467-3 8123-2 26464-8", "B59 B37.81 C46.0 B25.9",
    ),
    "prostatic hyperplasia": (
        "N40.1 R35.1 R39.12 N40.0", "G04CA02 G04CB01 G04CB02 G04BD08",
        "2857-1 630-4 2160-0 5803-2", "R33.8 N39.0 N13.8 N32.0",
    ),
}  # fmt: skip

# Leading condition, companion. Nearly every condition appears in two profiles or more.
PROFILES: tuple[tuple[str, str], ...] = (
    ("type 2 diabetes", "hypertension"),
    ("COPD", "heart failure"),
    ("chronic kidney disease", "hypertension"),
    ("heart failure", "atrial fibrillation"),
    ("coronary artery disease", "type 2 diabetes"),
    ("stroke", "atrial fibrillation"),
    ("asthma", "depression"),
    ("rheumatoid arthritis", "osteoporosis"),
    ("hypothyroidism", "depression"),
    ("obesity", "type 2 diabetes"),
    ("gout", "hypertension"),
    ("Parkinson's disease", "dementia"),
    ("epilepsy", "stroke"),
    ("breast cancer", "osteoporosis"),
    ("liver cirrhosis", "alcohol use disorder"),
    ("inflammatory bowel disease", "rheumatoid arthritis"),
    ("alcohol use disorder", "epilepsy"),
    ("HIV infection", "chronic kidney disease"),
    ("prostatic hyperplasia", "coronary artery disease"),
    ("asthma", "obesity"),
    ("dementia", "prostatic hyperplasia"),
    ("breast cancer", "hypothyroidism"),
    ("liver cirrhosis", "HIV infection"),
    ("COPD", "gout"),
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Population:
    """A hidden Markov model of patients. All arrays are float64 probabilities; the last axis of each sums to 1.

    Attributes:
        codes: names of the codes, as they stand in the MEDS column `code`
        profiles: names of the profiles
        stages: names of the stages
        prior: [profiles] a patient's profile
        initial: [profiles, stages] stage of the first visit
        transition: [profiles, stages, stages] stage of the next visit (last axis) given this one's
        emission: [profiles, stages, codes] one code of a visit
    """

    codes: tuple[str, ...]
    profiles: tuple[str, ...]
    stages: tuple[str, ...]
    prior: NDArray[np.float64]
    initial: NDArray[np.float64]
    transition: NDArray[np.float64]
    emission: NDArray[np.float64]

    def __post_init__(self) -> None:
        profiles, stages, codes = len(self.profiles), len(self.stages), len(self.codes)
        assert len(set(self.codes)) == codes, "a code is listed twice"
        shapes = {
            "prior": (profiles,),
            "initial": (profiles, stages),
            "transition": (profiles, stages, stages),
            "emission": (profiles, stages, codes),
        }
        for name, shape in shapes.items():
            array = getattr(self, name)
            assert array.shape == shape, f"{name}: {array.shape}, not {shape}"
            assert array.dtype == np.float64, f"{name}: {array.dtype}"
            assert (array >= 0).all(), f"{name}: a negative probability"
            assert np.allclose(array.sum(-1), 1, rtol=0, atol=1e-9), f"{name}: does not sum to 1"


def loinc(number: int) -> str:
    """The LOINC code of a number, with its Luhn check digit.

    >>> loinc(4548), loinc(2160)
    ('4548-4', '2160-0')
    """
    doubled = [digit * (2 if place % 2 == 0 else 1) for place, digit in enumerate(map(int, reversed(str(number))))]
    return f"{number}-{-sum(value // 10 + value % 10 for value in doubled) % 10}"


def code_book() -> tuple[dict[str, str], int]:
    """Code to description, the codes of `CONDITIONS` first, then fillers; and how many are no fillers."""
    kinds = ("diagnosis", "drug", "measurement", "complication")
    book: dict[str, str] = {}
    for condition, lists in CONDITIONS.items():
        for kind, prefix, listed in zip(kinds, PREFIXES, lists, strict=True):
            for code in listed.split():
                name = f"{prefix}//{code}"
                book[name] = f"{book[name]}; {condition}: {kind}" if name in book else f"{condition}: {kind}"
    own = len(book)
    generator = np.random.Generator(np.random.PCG64([MODEL_SEED, 0]))

    def pick(letters: str) -> str:
        return letters[generator.integers(len(letters))]

    while len(book) < CODE_COUNT:
        system = int(generator.choice(3, p=[0.45, 0.30, 0.25]))
        if system == 0:
            code = f"{pick('ABDEGHIJKLMNRST')}{generator.integers(100):02d}.{generator.integers(10)}"
        elif system == 1:
            group = f"{pick('ABCDGHJLMNPRSV')}{generator.integers(1, 17):02d}{pick('ABCDEFGHX')}{pick('ABCDEFGHX')}"
            code = f"{group}{generator.integers(1, 61):02d}"
        else:
            code = loinc(int(generator.integers(600, 60_000)))
        book.setdefault(f"{PREFIXES[system]}//{code}", f"incidental {kinds[system]}")
    return book, own


def population(structure: Structure) -> Population:
    """The population of a structure: `hmm` as above; `none` has one state that draws all codes alike.

    >>> hmm = population("hmm")
    >>> len(hmm.codes), hmm.profiles[1], hmm.emission.shape
    (995, 'COPD with heart failure', (24, 4, 995))
    >>> population("none").emission.shape
    (1, 1, 995)
    """
    book, own = code_book()
    codes = tuple(book)
    if structure == "none":
        return Population(
            codes=codes,
            profiles=("anyone",),
            stages=("any",),
            prior=np.ones(1),
            initial=np.ones((1, 1)),
            transition=np.ones((1, 1, 1)),
            emission=np.full((1, 1, len(codes)), 1 / len(codes)),
        )
    generator = np.random.Generator(np.random.PCG64([MODEL_SEED, 1]))
    index = {code: place for place, code in enumerate(codes)}
    profiles, stages = len(PROFILES), len(STAGES)

    by_kind = {name: np.zeros((len(PREFIXES), len(codes))) for name in CONDITIONS}  # each [kinds, codes]
    for condition, lists in CONDITIONS.items():
        for kind, (prefix, listed) in enumerate(zip(PREFIXES, lists, strict=True)):
            for code, share in zip(listed.split(), CODES_OF_A_KIND, strict=True):
                by_kind[condition][kind, index[f"{prefix}//{code}"]] = share

    background = np.empty(len(codes))
    background[generator.permutation(len(codes))] = np.arange(1, len(codes) + 1) ** -BACKGROUND_EXPONENT
    background /= background.sum()

    emission = np.empty((profiles, stages, len(codes)))
    for profile, (leading, companion) in enumerate(PROFILES):
        incidental = np.zeros(len(codes))
        chosen = own + generator.choice(len(codes) - own, INCIDENTAL_CODES, replace=False)
        incidental[chosen] = generator.dirichlet(np.full(INCIDENTAL_CODES, 3.0))
        conditions = LEADING_SHARE * by_kind[leading] + (1 - LEADING_SHARE) * by_kind[companion]  # [kinds, codes]
        emission[profile] = (
            BACKGROUND_SHARE * background
            + INCIDENTAL_SHARE * incidental
            + (1 - BACKGROUND_SHARE - INCIDENTAL_SHARE) * (KIND_GIVEN_STAGE @ conditions)
        )

    prior = np.linspace(1.5, 1.0, profiles)  # some profiles are more common than others, none is rare
    transition = np.stack(
        [np.stack([generator.dirichlet(NEXT_STAGE_CONCENTRATION * row) for row in NEXT_STAGE]) for _ in range(profiles)]
    )
    return Population(
        codes=codes,
        profiles=tuple(f"{leading} with {companion}" for leading, companion in PROFILES),
        stages=STAGES,
        prior=prior / prior.sum(),
        initial=np.tile(FIRST_STAGE, (profiles, 1)),
        transition=transition,
        emission=emission / emission.sum(-1, keepdims=True),
    )
