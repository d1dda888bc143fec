"""Who we are at a source: signatures that run out, an identity that is not the writer's, buckets whose reader pays."""

from __future__ import annotations

import json

import numpy as np
import pytest

from data_prep.geo import Grid
from data_prep.sources import ReadFault, raster, remote
from data_prep.sources.records import Asset
from data_prep.sources.remote import read_source
from tests.range_server import RangeServer
from tests.scenes import write_tiff

pytestmark = pytest.mark.integration
GRID = Grid("EPSG:32631", (10.0, 0.0, 600000.0, 0.0, -10.0, 5800020.0), 512, 512)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.001)
    for name in (
        "AWS_ENDPOINT_URL",
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_REQUEST_PAYER",
        "AWS_NO_SIGN_REQUEST",
    ):
        monkeypatch.delenv(name, raising=False)
    raster._open_rasters.held.clear()
    yield
    raster._open_rasters.held.clear()


def scene(path):
    pixels = np.random.default_rng(0).integers(1, 4000, (1, 512, 512)).astype(np.uint16)
    write_tiff(path, pixels, GRID, nodata=0, tiled=True, blockxsize=128, blockysize=128)
    return pixels


class Signer:
    """The Planetary Computer's signing service: every signature is another one, and only the newest is good."""

    def __init__(self, server, expiry):
        self.number, self.asked, self.server, self.expiry = 0, [], server, expiry
        server.answers["/sign"] = self.sign
        server.allows = lambda query: query == f"sig={self.number}"

    def sign(self, query):
        self.number += 1
        href = query.removeprefix("href=")
        self.asked.append(href)
        return 200, json.dumps({"msft:expiry": self.expiry, "href": f"{href}?sig={self.number}"}).encode()


@pytest.mark.parametrize(("expiry", "renewed"), [("2090-01-01T00:00:00Z", False), ("2020-01-01T00:00:00Z", True)])
def test_planetary_computer_hrefs_are_signed_as_they_are_read_and_again_when_it_has_run_out(
    tmp_path, monkeypatch, expiry, renewed
):
    pixels = scene(tmp_path / f"{renewed}.tif")
    with RangeServer(tmp_path) as server:
        monkeypatch.setattr(remote, "AZURE_HOST", "127.0.0.1")
        monkeypatch.setenv("VSICURL_PC_SAS_SIGN_HREF_URL", f"{server.url}/sign?href=")
        signer = Signer(server, expiry)
        href = f"{server.url}/{renewed}.tif"
        asset = Asset("i/x", "s2", href, bands=("B02",))
        with pytest.raises(Exception, match="403"):
            read_source(href)  # unsigned: nobody gets in
        for row in (0, 256):
            out = raster._read(asset, [1], window=raster._raster_window((row, row + 256, 0, 512)))
            assert (out == pixels[:, row : row + 256]).all()
        assert set(signer.asked) == {href}
        assert (len(signer.asked) > 1) == renewed


@pytest.mark.parametrize("reader", ["gdal", "fsspec"])
def test_a_source_is_read_under_its_own_identity_and_with_the_readers_consent_to_pay(tmp_path, monkeypatch, reader):
    """The output's identity stands in the standard variables and must reach no source's server."""
    pixels = scene(tmp_path / "eodata" / f"{reader}.tif")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "writer")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "writers-secret")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # where the output lies: nothing listens
    monkeypatch.setenv("SOURCE_AWS_ACCESS_KEY_ID", "reader")
    monkeypatch.setenv("SOURCE_AWS_SECRET_ACCESS_KEY", "readers-secret")
    monkeypatch.setenv("AWS_REQUEST_PAYER", "requester")
    with RangeServer(tmp_path) as server:
        monkeypatch.setenv("SOURCE_AWS_ENDPOINT_URL", server.url)
        href = f"s3://eodata/{reader}.tif"
        if reader == "gdal":
            out = raster._read(Asset("i/x", "s2", href, bands=("B02",)), [1])
            assert (out == pixels).all()
        else:
            assert read_source(href, 0, 64) == (tmp_path / "eodata" / "fsspec.tif").read_bytes()[:64]
        assert server.headers
        for headers in server.headers:
            said = {name.lower(): value for name, value in headers.items()}
            assert "Credential=reader/" in said["authorization"]
            assert said["x-amz-request-payer"] == "requester"
            assert "writer" not in str(said)


@pytest.mark.parametrize("reader", ["gdal", "fsspec"])
def test_public_buckets_are_read_without_an_identity(tmp_path, monkeypatch, reader):
    scene(tmp_path / "open" / f"{reader}.tif")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "writer")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "writers-secret")
    monkeypatch.setenv("AWS_NO_SIGN_REQUEST", "YES")
    with RangeServer(tmp_path) as server:
        monkeypatch.setenv("SOURCE_AWS_ENDPOINT_URL", server.url)
        href = f"s3://open/{reader}.tif"
        if reader == "gdal":
            raster.open_raster(href, "x").close()
        else:
            read_source(href, 0, 64)
        assert server.headers
        assert not any("authorization" in {name.lower() for name in headers} for headers in server.headers)


def test_the_real_server_lets_the_right_identity_in_and_no_other(tmp_path, monkeypatch, s3_url, s3_server):
    from cluster.storage import filesystem

    pixels = scene(tmp_path / "a.tif")
    fs, path = filesystem(s3_url)
    fs.put(str(tmp_path / "a.tif"), f"{path}/a.tif")
    right = s3_server.environment
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(f"SOURCE_{name}", right[name])
    monkeypatch.setenv("SOURCE_AWS_ENDPOINT_URL", right["AWS_ENDPOINT_URL"])
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "writer")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "writers-secret")
    asset = Asset("i/x", "s2", f"{s3_url}/a.tif", bands=("B02",))
    assert (raster._read(asset, [1]) == pixels).all()
    assert read_source(asset.href, 0, 4) == (tmp_path / "a.tif").read_bytes()[:4]
    monkeypatch.setenv("SOURCE_AWS_SECRET_ACCESS_KEY", "wrong")
    raster._open_rasters.held.clear()
    with pytest.raises(ReadFault):
        raster.open_raster(f"{s3_url}/a.tif", "x")
