"""From an area and dates to a plan: `sites` lays places on the ground, `prepare` finds every place its images.

lattice.py squares of one global lattice · area.py what ground is wanted · layout.py the sites file, splits by place ·
items.py images as tables · search.py where they come from · choose.py which of them a site gets · slices.py the plan's files ·
run.py the work of `prepare`, one slice at a time.
"""
