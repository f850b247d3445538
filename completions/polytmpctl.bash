# SPDX-License-Identifier: LGPL-2.1-or-later
# shellcheck shell=bash
# bash completion for polytmpctl(1)

__polytmpctl_users() {
    polytmpctl --no-legend --no-pager list 2>/dev/null | while read -r _ user _; do echo "$user"; done
}

_polytmpctl() {
    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]} verb='' user='' i word
    local -A OPTIONS=(
        [STANDALONE]='-h --help --version --no-pager --no-legend --no-ask-password -j -l --full'
        [ARGUMENT]='--json -n --lines -H --host -M --machine'
        [PATH]='-u --user'
        [ENTER]='--as-user'
        [REMOVE]='--persistent -y --yes'
        [CHECK]='--probe --service'
    )
    local verbs='list status ps usage path enter remove monitor check help'

    COMPREPLY=()
    # --json=pretty comes as three words
    if [[ $cur == '=' ]]; then cur=''; elif [[ $prev == '=' ]]; then prev=${COMP_WORDS[COMP_CWORD-2]};
    elif [[ $prev == --probe ]]; then prev=''; fi # its value has to be attached
    case $prev in
        --json) mapfile -t COMPREPLY < <(compgen -W 'pretty short off' -- "$cur"); return ;;
        -u|--user|--probe) mapfile -t COMPREPLY < <(compgen -u -- "$cur"); return ;;
        -H|--host) mapfile -t COMPREPLY < <(compgen -A hostname -- "$cur"); return ;;
        -M|--machine)
            mapfile -t COMPREPLY < <(compgen -W "$(machinectl list --full --no-legend --no-pager 2>/dev/null | cut -d' ' -f1)" -- "$cur")
            return ;;
        --service) mapfile -t COMPREPLY < <(cd /etc/pam.d && compgen -f -- "$cur"); return ;;
        -n|--lines) return ;;
    esac

    for ((i = 1; i < COMP_CWORD; i++)); do
        word=${COMP_WORDS[i]}
        case $word in
            --json|-n|--lines|-u|--user|--service|-H|--host|-M|--machine)
                if [[ ${COMP_WORDS[i+1]} == '=' ]]; then i=$((i + 2)); else i=$((i + 1)); fi ;;
            -*|=) ;;
            *) if [[ -z $verb ]]; then verb=$word; elif [[ -z $user ]]; then user=$word; fi ;;
        esac
    done

    if [[ $verb == enter && -n $user ]]; then
        if [[ $cur != -* ]]; then mapfile -t COMPREPLY < <(compgen -c -- "$cur"); fi
        return
    fi
    if [[ $cur == -* ]]; then
        local words="${OPTIONS[STANDALONE]} ${OPTIONS[ARGUMENT]}"
        case $verb in
            path) words="$words ${OPTIONS[PATH]}" ;;
            enter) words="$words ${OPTIONS[ENTER]}" ;;
            remove) words="$words ${OPTIONS[REMOVE]}" ;;
            check) words="$words ${OPTIONS[CHECK]}" ;;
        esac
        mapfile -t COMPREPLY < <(compgen -W "$words" -- "$cur")
        return
    fi
    case $verb in
        '') mapfile -t COMPREPLY < <(compgen -W "$verbs" -- "$cur") ;;
        status|ps|usage|enter) mapfile -t COMPREPLY < <(compgen -W "$(__polytmpctl_users)" -- "$cur") ;;
        remove) mapfile -t COMPREPLY < <(compgen -W "$(__polytmpctl_users)" -u -- "$cur") ;;
        path) mapfile -t COMPREPLY < <(compgen -f -- "$cur"); compopt -o filenames 2>/dev/null ;;
    esac
}

complete -F _polytmpctl polytmpctl
