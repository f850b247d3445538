# SPDX-License-Identifier: LGPL-2.1-or-later
.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c

VERSION := $(shell sed -n 's/^__version__ = "\(.*\)"$$/\1/p' polytmpd/__init__.py)

DESTDIR ?=
PREFIX ?= /usr
SYSCONFDIR ?= /etc
LIBEXECDIR ?= $(PREFIX)/libexec
# Where a Debian python3 looks for what packages install; not /usr/local, which is the administrator's.
PYTHONDIR ?= $(PREFIX)/lib/python3/dist-packages
UNITDIR ?= $(PREFIX)/lib/systemd/system
TMPFILESDIR ?= $(PREFIX)/lib/tmpfiles.d
CATALOGDIR ?= $(PREFIX)/lib/systemd/catalog
DATADIR ?= $(PREFIX)/share
# Where zsh looks: Debian has a directory of its own for packages.
ZSHDIR ?= $(DATADIR)/zsh/vendor-completions
# The pam/ Makefile knows where the system keeps its modules.
PAMDIR ?=
INSTALL ?= install

# The oldest that will do; Debian's own where there is one, since that is what is shipped with.
PYTHON ?= $(shell for p in /usr/bin/python3 python3 python3.13 python3.12 python3.11; do \
	"$$p" -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$p" && break; done || echo /usr/bin/python3)
VENV := .venv
PYTEST := $(VENV)/bin/python -m pytest
WORKERS ?= 2
# Tests of booted systems, a machine for each file and release: they wait more than they work.
E2E_WORKERS ?= 4
PYTEST_ARGS ?=

SETUP_PACKAGES := python3 python3-dev python3-venv build-essential pkgconf libpam0g-dev \
	dbus dpkg-dev debhelper dh-python mmdebstrap systemd systemd-container openssh-client pamtester \
	libxml2-utils shellcheck polkitd libpam-runtime udev util-linux man-db

MODULES := $(shell find polytmpd -name '*.py' 2>/dev/null)
MANPAGES := $(wildcard docs/man/*.[1-8])
SHELL_FILES := .ci/run completions/polytmpctl.bash $(wildcard debian/polytmp.postinst debian/polytmp.prerm debian/polytmp.postrm) \
	$(shell find tests -name '*.sh' 2>/dev/null)

help: ## Show this
	@echo "polytmp $(VERSION)"
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@printf '%s\n' '' 'After a change of           run make check, and then' \
		'  polytmpd/ctl              make test-e2e FILES="ctl tour"' \
		'  polytmpd/bus              make test-e2e FILES="polkit attacks_bus"' \
		'  polytmpd/kernel, blocking make test-kernel test-e2e FILES="mounts private attacks"' \
		'  polytmpd/displays         make test-kernel test-e2e FILES=x11' \
		'  daemon, executor, core    make test-kernel test-e2e FILES="lifetime faults faults_restart faults_state"' \
		'  pam, login                make test-pam test-e2e FILES="private failures attacks_bus"' \
		'  units, debian, Makefile   make test-e2e FILES="package bed"' \
		'  docs, README              nothing; the tour of the README: make test-e2e FILES=tour'

setup: $(VENV)/.stamp ## Install what the tests need (apt, as root) and make .venv

.PHONY: apt-packages
apt-packages:
	@missing=(); for package in $(SETUP_PACKAGES); do \
		dpkg-query -W -f='$${Status}' "$$package" 2>/dev/null | grep -q '^install ok installed$$' || missing+=("$$package"); \
	done; \
	if (( $${#missing[@]} )); then \
		if (( $$(id -u) )); then echo "make setup: as root, install: $${missing[*]}" >&2; exit 1; fi; \
		export DEBIAN_FRONTEND=noninteractive; \
		apt-get update -q || echo "make setup: apt-get update failed, ignoring" >&2; \
		apt-get install -q -y --no-install-recommends "$${missing[@]}"; \
	fi

$(VENV)/.stamp: pyproject.toml | apt-packages
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

check: setup lint test-unit ## Everything that takes seconds: linters, types, unit and bus tests

lint: setup ## ruff, mypy, shellcheck, xmllint (the units are verified by the unit tests)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	shellcheck $(SHELL_FILES)
	xmllint --noout --nonet dbus-policy/org.polytmp1.conf
	xmllint --noout --nonet --dtdvalid /usr/share/polkit-1/policyconfig-1.dtd dbus-policy/org.polytmp1.policy

format: setup ## Let ruff format and fix
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# One run of pytest each, so that each ends with its own summary; one that fails does not hide the next.
test: setup lint ## All tests; root, a booted Debian in a container (under 15 minutes)
	@rm -f .pytest_cache/v/cache/lastfailed; failed=(); for tier in unit kernel pam e2e; do \
		echo "== make test-$$tier"; $(MAKE) --no-print-directory "test-$$tier" || failed+=("$$tier"); \
	done; \
	if (( $${#failed[@]} )); then \
		$(PYTEST) --cache-show cache/lastfailed; echo "make test: failed: $${failed[*]}" >&2; exit 1; \
	fi; echo "make test: all tiers passed"

test-unit: setup ## Unit and bus tests; no privilege
	$(PYTEST) tests/unit $(wildcard tests/bus) $(PYTEST_ARGS)

test-kernel: setup ## Mounts and namespaces; root
	$(PYTEST) tests/kernel -n $(WORKERS) --timeout 300 $(PYTEST_ARGS)

test-pam: setup build-pam ## The PAM module through pamtester; root
	$(PYTEST) tests/pam -n $(WORKERS) $(PYTEST_ARGS)

# The trees first: no test's time is to depend on the mirror, which gets a second chance.
test-e2e: setup ## Booted Debian systems; root; FILES="ctl tour" for some of tests/e2e
	$(VENV)/bin/python -m tests.bed trees || $(VENV)/bin/python -m tests.bed trees
	$(PYTEST) $(or $(FILES:%=tests/e2e/test_%.py),tests/e2e) -n $(E2E_WORKERS) --dist loadgroup $(PYTEST_ARGS)

demo: setup ## The five objections, one after the other, on a booted Debian
	$(VENV)/bin/python -m tests.demo

# SECONDS=600, RELEASE=trixie|bookworm|both, SEED= of a former run
soak: setup ## Users at work on a system under stress, and a checker of everything; SECONDS=, RELEASE=, SEED=
	$(VENV)/bin/python -m tests.soak --seconds '$(or $(SECONDS),600)' --release '$(or $(RELEASE),both)' --seed '$(SEED)'

# Nothing is asserted. ROUNDS=30; QUICK=1 for small numbers that are only printed; FRESH=1 forgets an interrupted run.
bench: setup ## Measure, against plain systems, pam_namespace and rm, into docs/performance.md; ROUNDS=, QUICK=1, FRESH=1
	$(VENV)/bin/python -m bench $(if $(ROUNDS),--rounds '$(ROUNDS)') $(if $(QUICK),--quick) $(if $(FRESH),--fresh)

scale: setup ## Log in USERS=1000 users through PAM and logind, restart polytmpd, and check what is left; WRITE=1
	$(VENV)/bin/python -m bench.scale --users '$(or $(USERS),1000)' $(if $(WRITE),--write) $(SCALE_ARGS)

build-pam: ## pam/pam_polytmp.so
	$(MAKE) -C pam all

# In a copy: debhelper writes into the source tree, and the packages into its parent.
deb: ## The Debian package, in dist/ (installs build dependencies, as root)
	@if ! dpkg-checkbuilddeps 2>/dev/null; then \
		if (( $$(id -u) )); then dpkg-checkbuilddeps; fi; \
		apt-get update -q || echo "make deb: apt-get update failed, ignoring" >&2; \
		DEBIAN_FRONTEND=noninteractive apt-get build-dep -q -y --no-install-recommends ./; \
	fi
	rm -rf build/deb && mkdir -p build/deb/polytmp dist
	tar --create --exclude=./build --exclude=./dist --exclude=./.git --exclude=./$(VENV) --exclude=__pycache__ . \
		| tar --extract --directory build/deb/polytmp
	cd build/deb/polytmp && env -u MAKEFLAGS -u MAKELEVEL -u MFLAGS dpkg-buildpackage --build=binary --no-sign
	rm -f dist/polytmp_*.deb dist/polytmp-dbgsym_*.deb
	cp build/deb/*.deb build/deb/*.changes build/deb/*.buildinfo dist/
	rm -rf build/deb
	ls -l dist/*.deb

install: build-pam ## Install below $(DESTDIR)$(PREFIX)
	for module in $(MODULES); do $(INSTALL) -D -m 0644 "$$module" "$(DESTDIR)$(PYTHONDIR)/$$module"; done
	$(INSTALL) -d "$(DESTDIR)$(LIBEXECDIR)" "$(DESTDIR)$(PREFIX)/bin"
	printf '%s\n' '#!/usr/bin/python3 -I' 'from polytmpd.__main__ import main' '' 'raise SystemExit(main())' \
		> "$(DESTDIR)$(LIBEXECDIR)/polytmpd"
	printf '%s\n' '#!/usr/bin/python3 -I' 'from polytmpd.ctl.__main__ import program' '' 'program()' \
		> "$(DESTDIR)$(PREFIX)/bin/polytmpctl"
	chmod 0755 "$(DESTDIR)$(LIBEXECDIR)/polytmpd" "$(DESTDIR)$(PREFIX)/bin/polytmpctl"
	$(INSTALL) -d "$(DESTDIR)$(UNITDIR)"
	sed 's|/usr/libexec/|$(LIBEXECDIR)/|' units/polytmpd.service > "$(DESTDIR)$(UNITDIR)/polytmpd.service"
	chmod 0644 "$(DESTDIR)$(UNITDIR)/polytmpd.service"
	$(INSTALL) -D -m 0644 units/polytmpd.socket "$(DESTDIR)$(UNITDIR)/polytmpd.socket"
	$(INSTALL) -D -m 0644 units/polytmp.conf "$(DESTDIR)$(TMPFILESDIR)/polytmp.conf"
	$(INSTALL) -D -m 0644 units/polytmp.catalog "$(DESTDIR)$(CATALOGDIR)/polytmp.catalog"
# the administrator's once it is there
	test -e "$(DESTDIR)$(SYSCONFDIR)/polytmpd.conf" \
		|| $(INSTALL) -D -m 0644 units/polytmpd.conf "$(DESTDIR)$(SYSCONFDIR)/polytmpd.conf"
	$(INSTALL) -D -m 0644 units/org.polytmp1.service "$(DESTDIR)$(DATADIR)/dbus-1/system-services/org.polytmp1.service"
	$(INSTALL) -D -m 0644 dbus-policy/org.polytmp1.conf "$(DESTDIR)$(DATADIR)/dbus-1/system.d/org.polytmp1.conf"
	$(INSTALL) -D -m 0644 dbus-policy/org.polytmp1.policy "$(DESTDIR)$(DATADIR)/polkit-1/actions/org.polytmp1.policy"
	for profile in polytmp polytmp-lenient polytmp-early; do \
		$(INSTALL) -D -m 0644 "pam/$$profile.pam-config" "$(DESTDIR)$(DATADIR)/pam-configs/$$profile"; done
	$(INSTALL) -D -m 0644 completions/polytmpctl.bash "$(DESTDIR)$(DATADIR)/bash-completion/completions/polytmpctl"
	$(INSTALL) -D -m 0644 completions/_polytmpctl "$(DESTDIR)$(ZSHDIR)/_polytmpctl"
	for page in $(MANPAGES); do \
		$(INSTALL) -D -m 0644 "$$page" "$(DESTDIR)$(DATADIR)/man/man$${page##*.}/$${page##*/}"; done
	$(MAKE) -C pam install DESTDIR="$(DESTDIR)" $(if $(PAMDIR),PAMDIR="$(PAMDIR)")

uninstall: ## Remove what install installed (disable the PAM profile first: pam-auth-update --remove polytmp polytmp-lenient polytmp-early)
	rm -rf "$(DESTDIR)$(PYTHONDIR)/polytmpd"
	rm -f "$(DESTDIR)$(LIBEXECDIR)/polytmpd" "$(DESTDIR)$(PREFIX)/bin/polytmpctl" \
		"$(DESTDIR)$(UNITDIR)/polytmpd.service" "$(DESTDIR)$(UNITDIR)/polytmpd.socket" \
		"$(DESTDIR)$(TMPFILESDIR)/polytmp.conf" \
		"$(DESTDIR)$(CATALOGDIR)/polytmp.catalog" \
		"$(DESTDIR)$(DATADIR)/dbus-1/system-services/org.polytmp1.service" \
		"$(DESTDIR)$(DATADIR)/dbus-1/system.d/org.polytmp1.conf" \
		"$(DESTDIR)$(DATADIR)/polkit-1/actions/org.polytmp1.policy" "$(DESTDIR)$(DATADIR)/pam-configs/polytmp" \
		"$(DESTDIR)$(DATADIR)/pam-configs/polytmp-lenient" "$(DESTDIR)$(DATADIR)/pam-configs/polytmp-early" \
		"$(DESTDIR)$(DATADIR)/bash-completion/completions/polytmpctl" "$(DESTDIR)$(ZSHDIR)/_polytmpctl"
	! cmp -s units/polytmpd.conf "$(DESTDIR)$(SYSCONFDIR)/polytmpd.conf" || rm -f "$(DESTDIR)$(SYSCONFDIR)/polytmpd.conf"
	for page in $(MANPAGES); do rm -f "$(DESTDIR)$(DATADIR)/man/man$${page##*.}/$${page##*/}"; done
	rm -f "$(DESTDIR)$(or $(PAMDIR),/usr/lib/$(shell $(CC) -print-multiarch)/security)/pam_polytmp.so"

clean: ## Remove everything that was built, .venv too
	$(MAKE) -C pam clean
	rm -rf build dist $(VENV) *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find polytmpd tests -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: help setup check lint format test test-unit test-kernel test-pam test-e2e demo soak bench scale build-pam deb install \
	uninstall clean
