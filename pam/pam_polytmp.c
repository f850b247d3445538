/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * pam_polytmp: moves a login into its user's mount namespace.
 *
 * polytmpd decides who gets a namespace, what is in it and when it ends. This module decides which sessions are
 * logins, and what happens if polytmpd cannot be reached.
 *
 * Not here: the request to polytmpd (polytmpd.c), who is a system user (regular.c), entering and leaving
 * (namespace.c).
 */

#include <ctype.h>
#include <errno.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <syslog.h>

#include <security/pam_ext.h>
#include <security/pam_modutil.h>

#include "pam_polytmp.h"

#define EXPORT __attribute__((visibility("default")))

#define TIMEOUT_DEFAULT 20
#define TIMEOUT_MAX 600

/*
 * Programs that run a command as another user for whoever calls them, from the caller's terminal, with the
 * caller's files and working directory: the command stays in the caller's directories. Everything else logs its
 * user in. The names with a login shell are services of their own: sudo-i, su-l, runuser-l.
 */
static const char *const COMMAND_SERVICES[] = {
        "sudo",     /* and sudoedit, whose editor runs as the caller */
        "su",       /* without "-" */
        "runuser",  /* without "-l" */
        "doas",
        "polkit-1", /* pkexec */
        "pkexec",
};

/*
 * Servers that check passwords or count connections, and run nothing as the user. What their root process does
 * meanwhile belongs in the server's directories.
 */
static const char *const SERVER_SERVICES[] = {
        "dovecot", /* opens and closes the session while it checks a password; the mail process has none */
        "ppp",     /* pppd runs ip-up and others as root */
        "ocserv",  /* one process for all users; not all versions open sessions */
        "cups",    /* opens none */
};

static bool is_in(const char *const *services, size_t n, const char *service) {
        for (size_t i = 0; i < n; i++)
                if (strcmp(service, services[i]) == 0)
                        return true;
        return false;
}

#define IS_IN(services, service) is_in(services, sizeof(services) / sizeof((services)[0]), service)

int out_of_memory(const struct session *s) {
        pam_syslog(s->pamh, LOG_CRIT, "out of memory");
        return PAM_BUF_ERR;
}

/* One line for the log and one for the user, without the name of the error. */
int refuse(const struct session *s, const char *error_name, const char *format, ...) {
        CLEANUP(freep) char *reason = NULL;
        va_list ap;
        int n;

        va_start(ap, format);
        n = vasprintf(&reason, format, ap);
        va_end(ap);
        if (n < 0) {
                reason = NULL; /* vasprintf(3): undefined on failure */
                return out_of_memory(s);
        }
        for (int i = 0; i < n; i++) /* untrusted text for a log and a terminal */
                reason[i] = iscntrl((unsigned char) reason[i]) ? ' ' : reason[i];
        reason[n > 0 && reason[n - 1] == '.' ? n - 1 : n] = '\0'; /* the user's line continues after it */
        pam_syslog(s->pamh, LOG_ERR, "no private /tmp for user %s, refusing the session: %s%s%s",
                   s->user, error_name ? error_name : "", error_name ? ": " : "", reason);
        if (!(s->flags & PAM_SILENT))
                pam_error(s->pamh, "polytmp: cannot give you a private /tmp: %s; ask your administrator",
                          reason);
        return PAM_PERM_DENIED; /* a session error would not stop sudo */
}

static bool parse_number(const char *text, unsigned long max, unsigned long *ret) {
        unsigned long value;
        char *end;

        if (!isdigit((unsigned char) text[0])) /* strtoul() accepts blanks and signs */
                return false;
        errno = 0;
        value = strtoul(text, &end, 10);
        if (errno != 0 || *end != '\0' || value > max)
                return false;
        *ret = value;
        return true;
}

/* A typo must not lock everyone out: log what is wrong, when the session is opened, and ignore it. */
static void parse_arguments(struct session *s, int argc, const char **argv, bool opening) {
        s->timeout = TIMEOUT_DEFAULT;
        for (int i = 0; i < argc; i++) {
                unsigned long value;

                if (strcmp(argv[i], "debug") == 0)
                        s->debug = true;
                else if (strcmp(argv[i], "caller") == 0 || strcmp(argv[i], "user") == 0) {
                        s->caller = argv[i][0] == 'c'; /* the last one wins */
                        s->why = "argument";
                } else if (strncmp(argv[i], "timeout=", strlen("timeout=")) != 0) {
                        if (opening)
                                pam_syslog(s->pamh, LOG_ERR, "unknown module argument '%s', ignoring", argv[i]);
                } else if (parse_number(argv[i] + strlen("timeout="), TIMEOUT_MAX, &value) && value > 0)
                        s->timeout = value;
                else if (opening)
                        pam_syslog(s->pamh, LOG_ERR, "'%s' is not a number of seconds from 1 to %d, using %d",
                                   argv[i], TIMEOUT_MAX, TIMEOUT_DEFAULT);
        }
}

static int find_user(struct session *s) {
        const struct passwd *pw;

        if (!*s->user) {
                pam_syslog(s->pamh, LOG_ERR, "the session has no user name");
                return PAM_USER_UNKNOWN;
        }
        errno = 0;
        pw = pam_modutil_getpwnam(s->pamh, s->user);
        if (!pw) {
                if (errno == ENOMEM)
                        return out_of_memory(s);
                if (is_dynamic_user(s->user)) {
                        pam_syslog(s->pamh, LOG_INFO, "dynamic user %s keeps the host's directories", s->user);
                        return PAM_IGNORE;
                }
                pam_syslog(s->pamh, LOG_ERR, "user unknown: %s", s->user);
                return PAM_USER_UNKNOWN;
        }
        s->uid = pw->pw_uid;
        s->pw = pw;
        return PAM_SUCCESS;
}

/* System users (cron jobs, the boot of the host) must keep working while polytmpd is not running. */
int unreachable(const struct session *s, const char *why) {
        if (!is_certainly_system_user(s->pw))
                return refuse(s, NULL, "polytmpd cannot be reached: %s", why);
        pam_syslog(s->pamh, LOG_WARNING,
                   "system user %s stays in the caller's directories, polytmpd cannot be reached: %s", s->user, why);
        return PAM_IGNORE;
}

static const char *item(pam_handle_t *pamh, int type) {
        const void *value = NULL;

        return pam_get_item(pamh, type, &value) == PAM_SUCCESS && value ? value : "";
}

/* Whose directories the session uses: the arguments decide, otherwise the name of the service. */
static void decide(struct session *s, const char *service) {
        if (s->why)
                return;
        s->server = IS_IN(SERVER_SERVICES, service);
        s->caller = s->server || IS_IN(COMMAND_SERVICES, service);
        s->why = s->caller ? "name" : "default";
}

static struct session prepare(pam_handle_t *pamh, int flags, int argc, const char **argv, bool opening) {
        struct session s = { .pamh = pamh, .flags = flags, .user = item(pamh, PAM_USER) };
        const char *service = item(pamh, PAM_SERVICE);

        parse_arguments(&s, argc, argv, opening);
        decide(&s, service);
        if (s.debug && opening)
                pam_syslog(pamh, LOG_DEBUG, "service %s %s (%s): user %s %s directories", service,
                           s.server ? "is a server" : s.caller ? "runs commands" : "is a login", s.why, s.user,
                           s.caller ? "stays in the caller's" : "gets their own");
        return s;
}

static int open_session(struct session *s) {
        CLEANUP(closep) int fd = -1;
        bool refused;
        uid_t first;
        int r;

        if (begin_session(s->uid, &first, &refused))
                return refused && s->uid != 0 ?
                       refuse(s, NULL, "a session of UID %u in this process was refused and may be open", first) :
                       leave_for_several(s, first);
        if (s->uid == 0)
                return PAM_IGNORE; /* root is never moved, and polytmpd is not asked */
        r = check_caller(s);
        if (r != PAM_SUCCESS)
                return r;
        if (s->debug)
                pam_syslog(s->pamh, LOG_DEBUG, "requesting the namespace of user %s (%lu s)", s->user, s->timeout);
        r = acquire_namespace(s, &fd);
        if (r != PAM_SUCCESS)
                return r;
        if (!is_mount_namespace_of_ours(fd))
                return refuse(s, NULL, "polytmpd's reply is not a mount namespace of this host");
        return enter_namespace(s, fd);
}

EXPORT int pam_sm_open_session(pam_handle_t *pamh, int flags, int argc, const char **argv) {
        int saved_errno = errno;
        struct session s = prepare(pamh, flags, argc, argv, true);
        int r = s.caller ? PAM_IGNORE : find_user(&s);

        if (!s.caller && r == PAM_SUCCESS) {
                r = open_session(&s);
                if (r != PAM_SUCCESS && r != PAM_IGNORE)
                        note_refusal(&s);
        }
        errno = saved_errno;
        return r;
}

EXPORT int pam_sm_close_session(pam_handle_t *pamh, int flags, int argc, const char **argv) {
        int saved_errno = errno;
        struct session s = prepare(pamh, flags, argc, argv, false);

        if (!s.caller)
                end_session(&s);
        errno = saved_errno;
        return PAM_SUCCESS;
}
