"""STAC catalogs: which item and asset fields are read, and how items become sites.

A catalog is a stac-geoparquet file, one STAC item JSON file, an ItemCollection, or a folder of item JSON files (searched
recursively; `catalog.json` and `collection.json` are passed over). Every other layout is first turned into such items, so
this is the only door from metadata to pixels. Relative hrefs count from the item's own file (for parquet: from its folder).

Item
    id                        names the item in messages
    properties."geoloom:site" items with the same value form one site (its dates and modalities are joined). Default: the
                              item id. The shard key is this value with everything but letters, digits, `-`, `_` made `_`.
    properties."geoloom:cell" ground cell that decides the split. Default `grid:code`, else the 10 km Major-TOM cell of the
                              centre.
    properties."datetime"     or start_datetime/end_datetime with datetime null (cubes carry their own dates)
    properties."proj:code"    CRS of the site; also `proj:epsg`, `proj:wkt2`. Asset fields win over item fields.
    properties."proj:bbox"    footprint (xmin, ymin, xmax, ymax) in that CRS. Default: the ground all modalities share.
    properties."geoloom:labels"   scalar labels, e.g. {"scene": 3}
    properties."label:classes"    class names, [{"name": "scene", "classes": ["water", ...]}, {"name": "landcover", ...}];
                                  index = value
    properties, or the asset: "s2:processing_baseline" ("05.09"), "s2:product_uri"/"product_id", "sat:orbit_state",
                              "sar:polarizations", "eo:cloud_cover", "processing:level" ("L2A", "L1C"),
                              "earthsearch:boa_offset_applied"

Asset (the key is free, except for labels, whose key is the label's name)
    href                      any fsspec URL, or relative
    type                      `image/tiff…` GeoTIFF/COG, `application/vnd+zarr` Zarr; else judged by the extension
    "geoloom:modality"        "hr" | "s2" | "s2_l1c" (audited, never built) | "s1" | "cloud" | "scl" | "label".
                              Default: by band names (R, G, B → hr; B02 … → s2; VV, VH → s1), roles ("labels",
                              "cloud"), or common asset keys ("visual", "scl", "blue", "B02", "vv", …); others ignored.
    "eo:bands" or "bands"     [{"name": "B02"}, …] in file order. One asset may hold one band or all of them. `R G B N`,
                              `B02 … B8A … B12` (also `B2`), `VV VH`; band common names (red, nir08) are understood.
    "proj:code", "proj:transform" (6 numbers a b c d e f, pixel corner), "proj:shape" (rows, columns): optional; used so
                              that planning opens no file.
    "raster:bands"            [{"nodata": 0, "scale": 0.0001, "offset": -0.1, "data_type": "uint16", "unit": "dB"}, …].
                              s2: reflectance = DN * scale + offset. s1: unit "dB" or "linear".

Zarr cube (format 2 or 3; a group)
    array `data`              dims time, band, y, x (or the only 4-dimensional array; `geoloom:array` on the asset names it)
    attributes of the group   crs ("EPSG:32633" or WKT), transform [a, b, c, d, e, f], bands [names], datetimes [ISO 8601 UTC];
                              optional per-date lists product_ids, orbits ("ascending"/"descending"), baselines ("05.09");
                              optional nodata, unit ("dB"/"linear"), scale and offset (s2, as in raster:bands).
                              CF coordinates `time`, `band`, `x`, `y`, `spatial_ref` are read where attributes are missing.
    array `cloud`             optional uint8 [time, y, x], non-zero = cloud

Label rasters are integer GeoTIFFs; -1, and the declared nodata, mean unlabelled. A cloud raster is non-zero where cloudy.
"""

from __future__ import annotations
