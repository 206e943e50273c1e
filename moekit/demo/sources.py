"""The sources of the demo's training text: files of Debian packages by domain, with licences and copyrights."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from moekit.demo import readers
from moekit.demo.readers import Document


@dataclass(frozen=True)
class Source:
    """Files of one Debian package, and their reader."""

    package: str
    # Glob inside the unpacked package.
    files: str
    licence: str
    read: Callable[[Path], Iterator[Document]]
    # Regular expression for paths to leave out; the default matches no path.
    skip: str = "$^"


def _manuals(folder: str, suffix: str, language: str) -> list[Source]:
    """The translated manuals of one language; folder names are spelled as in the packages."""
    keep = readers.html(language)
    sources = [
        Source(
            "debian-handbook",
            f"usr/share/doc/debian-handbook/html/{folder}/*.html",
            "GPL-2+ or CC-BY-SA-3.0",
            keep,
        ),
        Source(
            "installation-guide-amd64",
            f"usr/share/doc/installation-guide-amd64/{suffix}/*.html",
            "GPL-2",
            keep,
            r"appendix|gpl|apf",
        ),
        Source(f"libreoffice-help-{suffix}", "usr/share/libreoffice/help/*/text/**/*.html", "MPL-2.0", keep),
        Source(
            f"developers-reference-{suffix}",
            "usr/share/developers-reference/**/*.html",
            "GPL-2+",
            keep,
            "genindex|search",
        ),
        Source(f"maint-guide-{suffix}", "usr/share/doc/maint-guide-*/html/*.html", "GPL-2+", keep),
        Source(f"debian-faq-{suffix}", "usr/share/doc/debian/FAQ/**/*.html", "Debian FAQ licence", keep),
        Source("gnome-user-docs", f"usr/share/help/{suffix}/gnome-help/*.page", "CC-BY-SA-3.0", keep),
    ]
    if suffix != "ru":
        sources.append(
            Source(f"debian-reference-{suffix}", "usr/share/debian-reference/*.html", "GPL-2+", keep)
        )
    return sources


DOMAINS: dict[str, list[Source]] = {
    "english": [
        Source("r-cran-janeaustenr", "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb",
               "public domain (novels of Jane Austen); the package itself is MIT", readers.r_novels),
    ],
    "german": _manuals("de-DE", "de", "german"),
    "french": _manuals("fr-FR", "fr", "french"),
    "russian": _manuals("ru-RU", "ru", "russian"),
    "manual": [
        Source("postgresql-doc-15", "usr/share/doc/postgresql-doc-15/html/*.html", "PostgreSQL",
               readers.html("english"),
               "bookindex|release|legalnotice|biblio|errcodes|keywords|acronyms|features"),
        Source("debian-handbook", "usr/share/doc/debian-handbook/html/en-US/*.html", "GPL-2+ or CC-BY-SA-3.0",
               readers.html("english")),
        Source("debian-reference-en", "usr/share/debian-reference/*.html", "GPL-2+", readers.html("english")),
    ],
    "python": [
        Source("libpython3.11-stdlib", "usr/lib/python3.11/**/*.py", "PSF-2.0", readers.code,
               "encodings/|pydoc_data/|_sysconfigdata|/test/|lib2to3/tests"),
        Source("libpython3.11-minimal", "usr/lib/python3.11/**/*.py", "PSF-2.0", readers.code,
               "encodings/|pydoc_data/|_sysconfigdata"),
    ],
    "c": [
        Source("libstb-dev", "usr/include/**/*.h", "public domain or MIT", readers.code,
               "/deprecated/|herringbone"),
        Source("postgresql-server-dev-15", "usr/include/postgresql/15/server/**/*.h", "PostgreSQL",
               readers.code, "ppport|fmgroids|fmgrprotos|errcodes|_d\\.h|snowball|unicode_"),
        Source("gnulib", "usr/share/gnulib/lib/**/*.c", "GPL-3+, LGPL-2.1+ or LGPL-3+ (by file)",
               readers.code, "uni(ctype|name|normal|case|width|lbrk|gbrk|wbrk)/"),
    ],
    "maths": [
        Source("metamath-databases", "usr/share/metamath/databases/set.mm", "CC0-1.0", readers.metamath),
    ],
}  # fmt: skip

# Copyright holders by the start of the package's name, from the copyright files in the packages.
HOLDERS = {
    "r-cran-janeaustenr": "Jane Austen (died 1817); package: Julia Silge",
    "debian-handbook": "Raphaël Hertzog, Roland Mas, Freexian SARL and translators",
    "installation-guide": "Bruce Perens, Sven Rudolph, Igor Grobman, James Treacy, Adam Di Carlo, "
    "Chris Tillman, the Debian Installer team and other contributors",
    "libreoffice-help": "Oracle and/or its affiliates; LibreOffice contributors and/or their affiliates",
    "developers-reference": "Christian Schwarz, Adam Di Carlo, Raphaël Hertzog, Andreas Barth, "
    "Lucas Nussbaum, Hideki Yamane, Holger Levsen and translators",
    "maint-guide": "Josip Rodin, Osamu Aoki, Craig Small, Raphaël Hertzog and translators",
    "debian-faq": "Software in the Public Interest",
    "debian-reference": "Osamu Aoki and translators",
    "gnome-user-docs": "Shaun McCance, the GNOME documentation project and translators",
    "postgresql": "PostgreSQL Global Development Group; The Regents of the University of California",
    "libpython3.11": "Python Software Foundation",
    "libstb": "Sean Barrett and contributors",
    "gnulib": "Free Software Foundation",
    "metamath": "the contributors of set.mm (dedicated to the public domain)",
}

PAGE = """\
# Where the demo's text comes from

Written by `python -m moekit.demo.corpus`. All text is taken from packages of Debian bookworm (main), whose
licences allow redistribution. The excerpts in `data/` stay under the licence of their source, named below;
moekit's own licence covers the code only. The full notices are in each package's
`/usr/share/doc/PACKAGE/copyright`. The text was changed: markup, repeats and copyright headers were
removed, white space was collapsed, paragraphs and lines of code became lines.

| domain | package | version | files | documents used | licence | copyright |
|---|---|---|---|---|---|---|
{rows}

The licences' texts:

- GPL-2, GPL-3, LGPL-2.1, LGPL-3 (and later versions): https://www.gnu.org/licenses/
- CC-BY-SA-3.0: https://creativecommons.org/licenses/by-sa/3.0/
- CC0-1.0: https://creativecommons.org/publicdomain/zero/1.0/
- MPL-2.0: https://www.mozilla.org/MPL/2.0/
- PostgreSQL: https://www.postgresql.org/about/licence/
- PSF-2.0: https://docs.python.org/3.11/license.html
- Debian FAQ licence: copies, also modified, under the same notice (in the package's copyright file)

## Held-out documents

The text in `data/valid.txt` and `data/test.txt`, in order (a `#` names a part of the file). None of these
documents is in the training text.

{held_out}
"""


def packages() -> list[str]:
    return sorted({source.package for sources in DOMAINS.values() for source in sources})


def holder(package: str) -> str:
    (name,) = (name for start, name in HOLDERS.items() if package.startswith(start))
    return name


def sources_page(versions: dict[str, str], corpus: dict[str, dict[str, list[Document]]]) -> str:
    """The text of SOURCES.md."""
    rows = []
    for domain, sources in DOMAINS.items():
        for source in sources:
            used = sum(
                d.name.startswith(source.package + "/") for part in corpus.values() for d in part[domain]
            )
            rows.append(
                f"| {domain} | {source.package} | {versions[source.package]} | `{source.files}` | {used} "
                f"| {source.licence} | {holder(source.package)} |"
            )
    held_out = [
        f"- {part}, {domain}: " + ", ".join(f"`{document.name}`" for document in corpus[part][domain])
        for part in ("valid", "test")
        for domain in DOMAINS
    ]
    return PAGE.format(rows="\n".join(rows), held_out="\n".join(held_out))
