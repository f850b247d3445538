/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Who is a system user for certain, while polytmpd cannot be asked. A user record (https://systemd.io/USER_RECORD/)
 * can make anyone else a regular user, whatever the number: they are refused meanwhile. polytmpd's rule is in
 * core/policy.py, and its reading of login.defs in core/logindefs.py; the tests compare the two.
 *
 * Not here: what polytmpd.conf(5) and user records say.
 *
 * Hard facts:
 *  - While a unit with DynamicUser= has a user, PID 1 has a link /run/systemd/dynamic-uid/direct:UID to the name, and
 *    one from direct:NAME to the UID. nss-systemd(8) reads them in dbus-daemon, which cannot ask PID 1.
 *  - In the processes in which PID 1 opens the sessions of units (PAMName=), nss-systemd(8) finds no dynamic user.
 *  - The greeters of GDM 49 and later are users in a range of their own, with homes in /run. Only the user database
 *    sets a home; users can change their shell.
 *  - shadow's tools take the last of several lines for a key in login.defs. pam_modutil_search_key() takes the
 *    first, ignores case and accepts "=".
 */

#include <ctype.h>
#include <errno.h>
#include <pwd.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

#include "pam_polytmp.h"

#define UID_MIN_DEFAULT 1000
#define UID_MAX_DEFAULT 60000
#define DYNAMIC_USERS "/run/systemd/dynamic-uid/direct:"
#define REGULAR_LAST 60000 /* up to here, polytmpd asks for no user record */

/* strtoul() also accepts blanks and signs, and binary numbers since glibc 2.38: not here. */
static uid_t parse_uid(const char *text, uid_t fallback) {
        unsigned long value;
        char *end;

        if (!isdigit((unsigned char) text[0]) || tolower((unsigned char) text[1]) == 'b')
                return fallback;
        errno = 0;
        value = strtoul(text, &end, 0);
        return errno == 0 && *end == '\0' && value > 0 && value < UINT32_MAX ? (uid_t) value : fallback;
}

/* If the line is one for the key, its value. Changes the line. */
static const char *login_defs_value(char *line, const char *key) {
        size_t n = strlen(line);

        while (n > 0 && strchr(" \t\n\v\f\r", line[n - 1]))
                line[--n] = '\0';
        line += strspn(line, " \t");
        n = strcspn(line, " \t");
        if (n != strlen(key) || strncmp(line, key, n) != 0 || line[n] == '\0')
                return NULL;
        line += n + strspn(line + n, " \t\"");
        line[strcspn(line, "\"")] = '\0';
        return line;
}

/* UID_MIN of login.defs(5), or 0 if the file cannot be read. A value that is no UID counts as the default. */
static uid_t read_uid_min(void) {
        uid_t min = UID_MIN_DEFAULT, max = UID_MAX_DEFAULT;
        FILE *file = fopen("/etc/login.defs", "re");
        char *line = NULL;
        size_t size = 0;
        bool whole;

        if (!file)
                return errno == ENOENT ? min : 0;
        while (getline(&line, &size, file) >= 0) {
                const char *value;

                if ((value = login_defs_value(line, "UID_MIN")))
                        min = parse_uid(value, UID_MIN_DEFAULT);
                else if ((value = login_defs_value(line, "UID_MAX")))
                        max = parse_uid(value, UID_MAX_DEFAULT);
        }
        whole = feof(file) && !ferror(file);
        free(line);
        fclose(file);
        if (!whole)
                return 0;
        return min <= max ? min : UID_MIN_DEFAULT; /* or every user would be a system user */
}

static bool dynamic_link(const char *key, char value[static 256]) {
        char path[sizeof(DYNAMIC_USERS) + 256];
        ssize_t n = -1;

        if (strlen(key) < 256 && !strchr(key, '/')) {
                stpcpy(stpcpy(path, DYNAMIC_USERS), key);
                n = readlink(path, value, 255);
        }
        value[n > 0 ? n : 0] = '\0';
        return n > 0;
}

/* Whether PID 1 has the user under both name and UID. */
bool is_dynamic_user(const char *name) {
        char uid[256], back[256];

        return dynamic_link(name, uid) && isdigit((unsigned char) uid[0]) &&
               dynamic_link(uid, back) && strcmp(name, back) == 0;
}

/* Of a user whom the user database knows. */
static bool has_dynamic_uid(const struct passwd *pw) {
        char uid[16], name[256];

        snprintf(uid, sizeof(uid), "%u", pw->pw_uid);
        return dynamic_link(uid, name) && strcmp(name, pw->pw_name) == 0;
}

static bool is_greeter(const struct passwd *pw) {
        return pw->pw_uid >= 60578 && pw->pw_uid <= 60705 && strncmp(pw->pw_dir, "/run/", strlen("/run/")) == 0;
}

bool is_certainly_system_user(const struct passwd *pw) {
        if (pw->pw_uid == 65534 || pw->pw_uid == 65535) /* nobody */
                return true;
        if (pw->pw_uid <= REGULAR_LAST)
                return pw->pw_uid < read_uid_min();
        return has_dynamic_uid(pw) || is_greeter(pw);
}
