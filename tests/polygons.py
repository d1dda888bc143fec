"""Overlap of convex polygons by clipping against half planes (Sutherland and Hodgman 1974): nothing of it is shared with the code."""

from __future__ import annotations

Points = list[list[float]]


def area(points: Points) -> float:
    """Signed: positive where the corners go from x to y."""
    return sum(a[0] * b[1] - a[1] * b[0] for a, b in zip(points, [*points[1:], *points[:1]])) / 2


def clip(points: Points, others: Points) -> Points:
    """What of the first lies in the second; both go from x to y."""
    for a, b in zip(others, [*others[1:], *others[:1]]):
        sides = [(b[0] - a[0]) * (p[1] - a[1]) - (b[1] - a[1]) * (p[0] - a[0]) for p in points]
        kept: Points = []
        for i, p in enumerate(points):
            q, s, t = points[(i + 1) % len(points)], sides[i], sides[(i + 1) % len(points)]
            if s >= 0:
                kept.append(p)
            if (s > 0 > t) or (s < 0 < t):
                kept.append([p[0] + (q[0] - p[0]) * s / (s - t), p[1] + (q[1] - p[1]) * s / (s - t)])
        points = kept
    return points


def clipped_iou(a: Points, b: Points) -> float:
    """Intersection over union of two convex polygons."""
    a, b = (points if area(points) > 0 else points[::-1] for points in (a, b))
    shared = area(clip(a, b))
    return shared / (area(a) + area(b) - shared)
