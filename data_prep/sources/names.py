"""What names tell: Sentinel product ids (date, baseline, level, orbit), band aliases, dates in file names. Pure functions."""

from __future__ import annotations

import datetime as dt
import re
from typing import Any

_S2 = re.compile(r"S2[A-D]_MSI(L1C|L2A)_(\d{8}T\d{6})_N(\d{4})_R(\d{3})_T(\w{5})(?:_(\d{8}T\d{6}))?")
# Granules and band files say the level without the rest: `S2A_OPER_MSI_L1C_TL_…_T31TDG_B01`, `T33UUU_…_MSIL1C_…`
_S2_LEVEL = re.compile(r"(?:^|[_/])MSI_?(L1C|L2A)(?:[_./]|$)")
_S1 = re.compile(r"(S1[A-D])_(?:IW|EW|S\d)_\w{4}_\w{4}_(\d{8}T\d{6})(?:_\d{8}T\d{6}_(\d{6}))?")
# Absolute orbit a satellite's relative orbit 1 falls on, less one; the cycle has 175 orbits. S1D's is not published yet.
_S1_ORBIT_SHIFT = {"S1A": 73, "S1B": 27, "S1C": 172}
_RTC_BURST = re.compile(r"OPERA_L2_RTC-S1_T(\d{3})-\d{6}-IW\d_(\d{8}T\d{6})Z_(\d{8}T\d{6})Z")
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
# What stands around a band's name in asset keys: `B02_10m`, `blue_20m`, `0_VV` (OPERA), `gamma0_vv`, `BAND_R` (Maxar)
_AROUND = re.compile(r"^(?:\d+_|gamma0_|sigma0_|gamma_?nought_|BAND_)?(.+?)(?:_\d+m)?$", re.IGNORECASE)


def band_name(name: str, hr: bool = False) -> str:
    """Our name of a band; an unknown name comes back as it is."""
    match = _AROUND.match(name.strip())
    text = match[1] if match else ""
    if hr:
        return HR_ALIASES.get(text.lower(), text.upper() if text.upper() in HR_BANDS else name.strip())
    if match := re.fullmatch(r"[Bb]0?(\d{1,2})", text):
        return f"B{int(match[1]):02d}"
    if text.lower() in ("b8a", "b08a"):
        return "B8A"
    if text.lower() in ("vv", "vh", "hh", "hv"):
        return text.upper()
    return _ALIASES.get(text.lower(), name.strip())


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


def cf_times(values: list[Any], units: str) -> list[str]:
    """CF numbers such as `days since 2020-01-01` as ISO 8601 text. Raises ValueError for other units."""
    match = re.match(r"(nanosecond|microsecond|millisecond|second|minute|hour|day)s? since (.+)", units.strip())
    if not match:
        raise ValueError(f"time coordinate has units {units!r}, wanted e.g. 'days since 2020-01-01'")
    seconds = {
        "nanosecond": 1e-9, "microsecond": 1e-6, "millisecond": 1e-3, "second": 1, "minute": 60, "hour": 3600, "day": 86400,
    }[match[1]]  # fmt: skip
    origin = iso_datetime(match[2].strip())
    if not origin:
        raise ValueError(f"time coordinate counts from {match[2]!r}, which is no date")
    start = dt.datetime.fromisoformat(origin)
    return [(start + dt.timedelta(seconds=float(value) * seconds)).isoformat() for value in values]


def date_in(name: str) -> str:
    """The first date in a file name, as ISO; "" if there is none. The stamp in an old granule's name is of its processing."""
    if "_OPER_MSI_" in name:
        return ""
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


def s2_level(name: str) -> str:
    """L1C or L2A where a product, granule or band file's name says so; ""."""
    match = _S2_LEVEL.search(name)
    return match[1] if match else ""


def processed(name: str) -> str:
    """When the product named inside `name` was made (`YYYYMMDDTHHMMSS`); "" if its name does not say."""
    if match := _S2.search(name):
        return match[6] or ""
    match = _RTC_BURST.search(name)
    return match[3] if match else ""


def s1_datetime(name: str) -> str:
    """Sensing start of a Sentinel-1 product or OPERA burst id inside `name`; ""."""
    if match := _S1.search(name):
        return compact_datetime(match[2])
    match = _RTC_BURST.search(name)
    return compact_datetime(match[2]) if match else ""


def relative_orbit(name: str) -> int:
    """Track (1…143 for Sentinel-2, 1…175 for Sentinel-1) of the product id inside `name`; 0 if it tells none."""
    if parsed := s2_product(name):
        return int(parsed["relative_orbit"])
    if match := _RTC_BURST.search(name):
        return int(match[1])
    match = _S1.search(name)
    if not match or not match[3] or match[1] not in _S1_ORBIT_SHIFT:
        return 0
    return (int(match[3]) - _S1_ORBIT_SHIFT[match[1]]) % 175 + 1
