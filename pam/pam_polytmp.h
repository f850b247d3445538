/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What the parts of pam_polytmp.so share: the session, and how they report. */
#pragma once

#include <pwd.h>
#include <stdbool.h>
#include <stdlib.h>
#include <sys/types.h>
#include <unistd.h>

#include <security/pam_modules.h>

#define CLEANUP(function) __attribute__((cleanup(function)))
#define UNUSED __attribute__((unused))

struct session {
        pam_handle_t *pamh;
        int flags;
        const char *user;
        uid_t uid;
        const struct passwd *pw; /* libpam's, until pam_end(3) */
        unsigned long timeout; /* seconds, for connection and reply together */
        bool debug;
        bool caller; /* stays in the directories of its caller */
        bool server; /* caller, because the service is a server */
        const char *why;
};

static inline void closep(int *fd) {
        if (*fd >= 0)
                close(*fd);
}

static inline void freep(char **p) {
        free(*p);
}

/* pam_polytmp.c: log, tell the user, and return what the module returns */

int out_of_memory(const struct session *s);

__attribute__((format(printf, 3, 4)))
int refuse(const struct session *s, const char *error_name, const char *format, ...);

/* polytmpd cannot be reached: refuses the session, unless the user is a system user. */
int unreachable(const struct session *s, const char *why);

/* regular.c */

/* Whether PID 1 has a user of a unit with DynamicUser= under both name and UID. */
bool is_dynamic_user(const char *name);

/* Whether polytmpd never calls the user regular. If login.defs cannot be read, this is certain of few. */
bool is_certainly_system_user(const struct passwd *pw);

/* polytmpd.c */

/* On PAM_SUCCESS the caller closes *ret_fd. The connection and the descriptors received on it are closed. */
int acquire_namespace(const struct session *s, int *ret_fd);

/* namespace.c */

/* Counts a session of the process. Returns whether it has opened sessions for several users, of whom *ret_first
 * was the first; *ret_refused says whether all others were refused. */
bool begin_session(uid_t uid, uid_t *ret_first, bool *ret_refused);

/* The session that was counted last is refused. */
void note_refusal(const struct session *s);

/* Takes the process back to where it came from, if it was moved. PAM_IGNORE, or PAM_PERM_DENIED if it cannot go. */
int leave_for_several(const struct session *s, uid_t first);

/* Checks for namespaces that the session must not leave. PAM_SUCCESS if there are none. */
int check_caller(const struct session *s);

bool is_mount_namespace_of_ours(int fd);

/* Joins the namespace unless the caller is in it. */
int enter_namespace(const struct session *s, int ns_fd);

/* After the last session the process goes back to where it came from. Reports failures, and cannot fail. */
void end_session(const struct session *s);
