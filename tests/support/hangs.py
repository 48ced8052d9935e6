"""A program that takes any arguments and never says that it is ready; a domain's, in tests of hosts."""

import time

if __name__ == "__main__":
    time.sleep(120)
