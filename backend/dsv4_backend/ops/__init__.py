"""One module per operator family;
importing this package declares every contract, family after family by name.
"""

from importlib import import_module
from pkgutil import iter_modules

for _family in sorted(found.name for found in iter_modules(__path__)):
    import_module(f"{__name__}.{_family}")
