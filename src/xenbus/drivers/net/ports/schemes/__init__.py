"""One far side a file. Importing a file registers its opener."""
