# Read when `pavo` is first completed. From the program itself: it always fits.
pavo completion fish | source
