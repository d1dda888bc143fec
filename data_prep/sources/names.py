"""What names tell: Sentinel product ids (date, baseline, level, orbit), band aliases, dates in file names. Pure functions."""

from __future__ import annotations

import datetime as dt
import re

_S2 = re.compile(r"S2[A-D]_MSI(L1C|L2A)_(\d{8}T\d{6})_N(\d{4})_R(\d{3})_T(\w{5})(?:_(\d{8}T\d{6}))?")
_S1 = re.compile(r"S1[A-D]_(?:IW|EW|S\d)_\w{4}_\w{4}_(\d{8}T\d{6})")
_DAY = re.compile(
    r"(?<!\d)((?:19|20)\d{2})[-_]?(0[1-9]|1[0-2])[-_]?(0[1-9]|[12]\d|3[01])(?:T(\d{2}):?(\d{2}):?(\d{2}))?(?!\d)"
)

# Other people's names of our bands: STAC common names, Earth-search asset keys, names without the leading zero.
_ALIASES = {
    "red": "B04", "green": "B03", "blue": "B02", "coastal": "B01", "nir": "B08", "nir08": "B8A", "nir09": "B09",
    "rededge1": "B05", "rededge2": "B06", "rededge3": "B07", "rededge071": "B05", "rededge075": "B06", "rededge078": "B07",
    "cirrus": "B10", "swir16": "B11", "swir22": "B12",
}  # fmt: skip
S2_BANDS = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B10", "B11", "B12")
L1C_ORDER = S2_BANDS
L2A_ORDER = tuple(band for band in S2_BANDS if band != "B10")
HR_BANDS = ("R", "G", "B", "N")
HR_ALIASES = {"red": "R", "green": "G", "blue": "B", "nir": "N", "nir08": "N"}


def band_name(name: str, hr: bool = False) -> str:
    """Our name of a band; an unknown name comes back as it is."""
    text = name.strip()
    if hr:
        return HR_ALIASES.get(text.lower(), text.upper() if text.upper() in HR_BANDS else text)
    if match := re.fullmatch(r"[Bb]0?(\d{1,2})", text):
        return f"B{int(match[1]):02d}"
    if text.lower() in ("b8a", "b08a"):
        return "B8A"
    if text.lower() in ("vv", "vh", "hh", "hv"):
        return text.upper()
    return _ALIASES.get(text.lower(), text)


def compact_datetime(text: str) -> str:
    """`20220706T085611` → `2022-07-06T08:56:11Z`; "" if it is no date."""
    try:
        return dt.datetime.strptime(text, "%Y%m%dT%H%M%S").strftime("%Y-%m-%dT%H:%M:%SZ")
    except ValueError:
        return ""


def iso_datetime(text: str) -> str:
    """Any ISO 8601 time as `YYYY-MM-DDTHH:MM:SSZ` in UTC (no zone means UTC); "" if it is none."""
    text = text.strip().replace("UTC", "+00:00").replace("Z", "+00:00")
    text = re.sub(r"(\.\d{6})\d+", r"\1", text)
    try:
        moment = dt.datetime.fromisoformat(text)
    except ValueError:
        return compact_datetime(text)
    if moment.tzinfo is not None:
        moment = moment.astimezone(dt.UTC)
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def date_in(name: str) -> str:
    """The first date in a file name, as ISO; "" if there is none."""
    if match := _DAY.search(name):
        year, month, day, hour, minute, second = match.groups()
        try:
            moment = dt.datetime(int(year), int(month), int(day), int(hour or 0), int(minute or 0), int(second or 0))
        except ValueError:
            return ""
        return moment.strftime("%Y-%m-%dT%H:%M:%SZ")
    return ""


def s2_product(name: str) -> dict[str, str]:
    """level, datetime, baseline ("" for N9999), tile of a Sentinel-2 product id inside `name`; {} if there is none."""
    if not (match := _S2.search(name)):
        return {}
    level, sensed, baseline, orbit, tile, _ = match.groups()
    return {
        "level": level,
        "datetime": compact_datetime(sensed),
        "baseline": "" if baseline == "9999" else f"{baseline[:2]}.{baseline[2:]}",
        "relative_orbit": orbit,
        "tile": tile,
    }


def s1_datetime(name: str) -> str:
    """Sensing start of a Sentinel-1 product id inside `name`; ""."""
    match = _S1.search(name)
    return compact_datetime(match[1]) if match else ""
