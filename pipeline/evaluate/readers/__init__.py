"""One reader per published layout. A reader is a function (root, row) → `LabelledSet`; it opens no pixels before an item is read."""
