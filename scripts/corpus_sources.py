"""The sources of the text corpus: which files of which package are read how, into which domain and group."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Source:
    """Files of one package, of one domain."""

    package: str
    domain: str
    reader: str
    """markup, man, text, code, dictionary, tar (an archive inside the package) or bible."""
    pattern: str
    """Regular expression for the paths inside the package."""
    group: str
    """Documents of one group are never divided between splits; `{1}` is the first group of the pattern. All languages
    of one work have the same one."""
    licence: str


LANGUAGES = ("de", "es", "fr", "it", "ja", "pl", "ru", "zh")
LOCALES = {"zh": "zh_CN"}
GPL2, GPL3 = "GPL-2+", "GPL-3+"


def _docs() -> list[Source]:
    sources = [
        Source(package=name, domain="docs-en", reader=reader, pattern=pattern, group=name, licence=licence)
        for name, reader, pattern, licence in (
            ("postgresql-doc-15", "markup", r"html/.*\.html$", "PostgreSQL"),
            ("rust-doc", "markup", r"html/(?:book|reference|rust-by-example|rustc|cargo|nomicon|edition-guide|embedded-"
             r"book|unstable-book|rustdoc)/(?!print).*\.html$", "MIT or Apache-2.0"),
            ("git-doc", "text", r"/git-doc/(?!RelNotes)[^/]*\.txt$", "GPL-2"),
            ("sqlite3-doc", "markup", r"/sqlite3/.*\.html$", "public domain"),
            ("python-django-doc", "markup", r"html/(?!_|genindex|py-mod).*\.html$", "BSD-3-Clause"),
            ("perl-doc", "text", r"pod/(?!perl5\d+delta|perltoc).*\.pod$", "Artistic-1.0 or GPL-1+"),
            ("cmake-doc", "text", r"_sources/.*\.txt$", "BSD-3-Clause"),
            ("nodejs-doc", "markup", r"api/(?!all\.).*\.html$", "MIT"),
            ("vim-runtime", "text", r"vim90/doc/(?!tags|version).*\.txt$", "Vim"),
            ("erlang-doc", "markup", r"/doc/.*\.html$", "Apache-2.0"),
            ("llvm-14-doc", "text", r"_sources/.*\.txt$", "Apache-2.0 with LLVM exception"),
            ("debian-policy", "markup", r"policy\.html/.*\.html$", GPL2),
        )
    ]  # fmt: skip
    for language in ("en", *LANGUAGES):
        sources += _translated(language)
    return sources


def _translated(language: str) -> list[Source]:
    locale, suffix = LOCALES.get(language, language), {"zh": "zh-cn"}.get(language, language)
    pages = ("manpages", "manpages-dev") if language == "en" else (f"manpages-{language}", f"manpages-{language}-dev")
    folder = "" if language == "en" else f"{locale}/"
    handbook = {"en": "en-US", "zh": "zh-CN", "ja": "ja-JP"}.get(language, f"{language}-{language.upper()}")
    of = {"en": "-en-us", "zh": "-zh-cn"}.get(language, f"-{language}")
    own = "" if language == "en" else f"-{suffix}"
    rows = [
        (pages[0], "man", rf"/man/{folder}man\d/([^/]*)\.\d\w*\.gz$", "man/{1}", "GPL-3+ and those of each page"),
        (pages[1], "man", rf"/man/{folder}man\d/([^/]*)\.\d\w*\.gz$", "man/{1}", "GPL-3+ and those of each page"),
        ("debian-handbook", "markup", rf"html/{handbook}/.*\.html$", "debian-handbook", "CC-BY-SA-3.0 or GPL-2+"),
        (f"aptitude-doc-{language}", "markup", r"html/.*\.html$", "aptitude", GPL2),
        (f"debian-reference-{suffix}", "markup", r"debian-reference/.*\.html$", "debian-reference", GPL2),
        (f"debian-faq{own}", "markup", r"FAQ/.*\.html$", "debian-faq", GPL2),
        (f"developers-reference{own}", "markup", r"/\w*\.html$", "developers-reference", GPL2),
        (f"maint-guide{own}", "markup", r"html/.*\.html$", "maint-guide", GPL2),
        (f"libreoffice-help{of}", "markup", r"/text/(\w+)/.*\.html$", "libreoffice/{1}", "MPL-2.0 or LGPL-3+"),
        ("gnome-user-docs", "markup", rf"help/{'C' if language == 'en' else locale}/.*\.page$", "gnome",
         "CC-BY-SA-3.0"),
        ("apache2-doc", "markup", rf"manual/{suffix}/.*\.html$", "apache2", "Apache-2.0"),
    ]  # fmt: skip
    return [
        Source(package=package, domain=f"docs-{language}", reader=reader, pattern=pattern, group=group, licence=licence)
        for package, reader, pattern, group, licence in rows
    ]


CODE = {
    "code-c": r"\.[ch]$",
    "code-cpp": r"\.(?:hpp|ipp|h|cpp)$|eigen3/Eigen/src/.*",
    "code-python": r"(?<!_tables)\.py$",
    "code-javascript": r"(?<!\.min)\.(?:js|mjs|ts)$",
    "code-rust": r"\.rs$",
    "code-go": r"(?<!tables)\.go$",
    "code-ruby": r"\.rb$",
    "code-perl": r"(?<!unicore)/\w+\.p[lm]$",
    "code-lisp": r"\.(?:el|el\.gz|lisp)$",
}
"""Domain -> pattern of its files."""
CODE_PACKAGES = """
code-c           LGPL-2.1+              glibc-source libglib2.0-dev
code-c           LGPL-2+                libgtk-3-dev
code-c           GPL-3+                 binutils-source
code-cpp         BSL-1.0                libboost1.74-dev catch2 librange-v3-dev
code-cpp         MPL-2.0                libeigen3-dev
code-cpp         LGPL-3+/GPL-3+         libcgal-dev
code-cpp         MIT                    nlohmann-json3-dev
code-cpp         Apache-2.0             libtbb-dev
code-python      BSD-3-Clause           python3-django python3-sympy python3-networkx python3-pandas
code-python      MIT                    python3-twisted python3-sqlalchemy
code-python      BSD-2-Clause           python3-pygments
code-python      public-domain/BSD-2    python3-docutils
code-python      GPL-2+                 mercurial-common
code-javascript  MIT                    webpack eslint node-babel7 node-core-js libjs-three node-lodash
code-javascript  Artistic-2.0           npm
code-javascript  Apache-2.0             node-typescript
code-rust        MIT/Apache-2.0         rust-src librust-syn-dev librust-serde-dev librust-tokio-dev librust-clap-dev
code-rust        MIT/Apache-2.0         librust-regex-syntax-dev librust-rand-dev librust-hyper-dev librust-nom-dev
code-rust        MIT/Apache-2.0         librust-image-dev librust-rayon-dev librust-bindgen-dev librust-rustls-dev
code-rust        MIT/Apache-2.0         librust-nix-dev librust-chrono-dev librust-rusqlite-dev librust-gio-dev
code-go          BSD-3-Clause           golang-1.19-src golang-golang-x-tools-dev golang-golang-x-net-dev
code-go          BSD-3-Clause           golang-golang-x-text-dev golang-github-gogo-protobuf-dev
code-go          Apache-2.0             golang-google-grpc-dev golang-github-spf13-cobra-dev
code-go          Apache-2.0             golang-github-prometheus-client-golang-dev golang-github-docker-docker-dev
code-ruby        BSD-2-Clause/Ruby      libruby3.1
code-ruby        Apache-2.0             puppet-agent
code-ruby        MIT                    ruby-activerecord ruby-activesupport ruby-actionpack ruby-asciidoctor jekyll
code-ruby        MIT                    rubocop ruby-sequel ruby-sass rake ruby-rspec-core ruby-kramdown ruby-mail
code-ruby        MIT                    ruby-fog-aws
code-perl        Artistic-1.0/GPL-1+    perl-modules-5.36 libmoose-perl libcatalyst-perl libimage-exiftool-perl
code-perl        Artistic-1.0/GPL-1+    libdbix-class-perl libbio-perl-perl libdatetime-perl libperl-critic-perl
code-perl        Artistic-2.0           libmojolicious-perl
code-perl        GPL-2+                 perltidy
code-perl        Apache-2.0             spamassassin
code-lisp        GPL-3+                 emacs-el elpa-magit elpa-helm elpa-haskell-mode elpa-projectile elpa-lsp-mode
code-lisp        GPL-3+                 elpa-yasnippet
code-lisp        public-domain/GPL-2+   slime
"""
"""Domain, licence and packages: each package is a group."""


def list_sources() -> list[Source]:
    """Return all sources."""
    sources = _docs()
    for line in CODE_PACKAGES.strip().splitlines():
        domain, licence, *packages = line.split()
        sources += [
            Source(
                package=package,
                domain=domain,
                reader="tar" if package.endswith("-source") else "code",
                pattern=CODE[domain],
                group=package,
                licence=licence,
            )
            for package in packages
        ]
    for package, language, licence in (
        ("dict-gcide", "en", GPL3),
        ("dict-wn", "en", "WordNet"),
        ("dict-foldoc", "en", "GFDL-1.2+"),
        ("dict-freedict-deu-eng", "de", GPL2),
        ("dict-freedict-jpn-eng", "ja", "CC-BY-SA-3.0"),
    ):
        sources.append(
            Source(
                package=package,
                domain=f"dictionary-{language}",
                reader="dictionary",
                pattern=r"\.dict\.dz$",
                group=package,
                licence=licence,
            )
        )
    # The texts of the licences that the notices of the others refer to.
    nothing = Source(package="base-files", domain="-", reader="text", pattern=r"(?!)", group="-", licence="-")
    return [*sources, nothing]


def format_licences(versions: dict[str, str]) -> str:
    """Return a Markdown table of the packages, with their versions, of each domain and licence."""
    packages: dict[tuple[str, str], list[str]] = {}
    for source in list_sources():
        if source.package in versions and source.licence != "-":
            packages.setdefault((source.domain, source.licence), []).append(source.package)
    rows = [
        f"| {domain} | {licence} | {', '.join(f'{name} {versions[name]}' for name in dict.fromkeys(names))} |"
        for (domain, licence), names in sorted(packages.items())
    ]
    return "\n".join(["| domain | licence | packages |", "|---|---|---|", *rows])
